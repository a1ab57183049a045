"""The parts of fast.py in PyTorch: layers with forward and backward written out. fused.py has the compiled ones.

Shapes: B sequences, L tokens each (padded on the right), N = B * L, D width, H heads, d = D / H.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropout import Draw
from linear import Arena, Linear, LoraLinear, apply, device_lora, make_linear, put

aten = torch.ops.aten
Stream = tuple[Tensor, Tensor | None]  # between layers: see Layer.forward and Layer.backward


def total(stream: Stream) -> Tensor:
    """The gradient whose fp32 and bf16 parts `stream` holds."""
    return stream[0] if stream[1] is None else stream[0] + stream[1]


class Norm:
    """Layer norm in fp32 on fp32 input, with ATen's own backward."""

    def __init__(self, arena: Arena, module: nn.LayerNorm):
        self.arena, self.eps = arena, module.eps
        self.weight, self.bias = module.weight.data, module.bias.data
        self.dweight, self.dbias = arena.grad_view([module.weight]), arena.grad_view([module.bias])

    def forward(self, z: Tensor) -> tuple[Tensor, tuple]:
        y, mean, rstd = aten.native_layer_norm(z, [z.shape[-1]], self.weight, self.bias, self.eps)
        return y, (z, mean, rstd)

    def backward(self, dy: Tensor, saved: tuple) -> Tensor:
        z, mean, rstd = saved
        rest = ([z.shape[-1]], mean, rstd, self.weight, self.bias)

        def weights() -> None:
            _, dw, db = aten.native_layer_norm_backward(dy, z, *rest, [False, True, True])
            put(self.dweight, dw), put(self.dbias, db)

        if self.dweight is not None:
            self.arena.aside(weights)
        return aten.native_layer_norm_backward(dy, z, *rest, [True, False, False])[0]


def dropped_add(x: Tensor, y: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """x + dropout(y), x fp32."""
    return x + y if keep is None else torch.addcmul(x, y, keep, value=1 / (1 - p))


@dataclass
class Shape:
    """What the layers need to know about a batch."""

    b: int  # B
    length: int  # L
    lengths: Tensor  # [B] int64
    dtype: torch.dtype = torch.float32

    @cached_property
    def hidden_keys(self) -> Tensor | None:
        """[B, 1, 1, L]: -inf at padding; None on the CPU where nothing is padded: to ask a GPU is to wait for it."""
        hidden = torch.arange(self.length, device=self.lengths.device) >= self.lengths[:, None]  # [B, L]
        if hidden.device.type == "cpu" and not hidden.any():
            return None
        whole = -(-self.length // 8) * 8  # where rows begin: as the kernels for GPUs want it
        keys = torch.zeros(self.b, 1, 1, whole, dtype=self.dtype, device=hidden.device)[..., : self.length]
        return keys.masked_fill_(hidden[:, None, None], -math.inf)


class Attention:
    """Softmax attention over [B, L], plain batched products forward and backward.

    For short sequences `scaled_dot_product_attention`'s CPU kernels (no dropout, slow backward) lose to four
    batched products; fp32 products are as fast as bf16 ones there, so up to `SHORT` tokens this is fp32.
    """

    SHORT = 64

    def __init__(self, heads: int, width: int, p: float):
        self.heads, self.width, self.p = heads, width, p

    def split(self, x: Tensor, shape: Shape) -> Tensor:
        """[B * T, g * D] -> [g, B * H, T, d], in the dtype the products want."""
        t, g = len(x) // shape.b, x.shape[1] // self.width
        short = x.device.type == "cpu" and shape.length <= self.SHORT
        dtype = torch.float32 if short else x.dtype
        x = x.view(shape.b, t, g, self.heads, -1).permute(2, 0, 3, 1, 4)
        return x.to(dtype, memory_format=torch.contiguous_format).reshape(g, shape.b * self.heads, t, -1)

    def merge(self, x: Tensor, shape: Shape) -> Tensor:
        """[B * H, T, d] or [B, H, T, d] -> [B * T, D], without a copy where it lies so."""
        return x.view(shape.b, self.heads, *x.shape[-2:]).transpose(1, 2).reshape(-1, self.width)

    def join(self, heads: Sequence[Tensor], shape: Shape) -> Tensor:
        """g of those -> [B * T, g * D]."""
        return torch.cat([self.merge(x, shape) for x in heads], 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, draw: Draw) -> tuple[Tensor, tuple]:
        """q: [B H, Lq, d]; k, v: [B H, L, d] (q and v are scaled in place) -> context [B H, Lq, d]."""
        q.mul_(q.shape[-1] ** -0.5)
        scores = torch.bmm(q, k.transpose(1, 2))  # [B H, Lq, L]
        if shape.hidden_keys is not None:
            scores.view(shape.b, self.heads, -1, shape.length).add_(shape.hidden_keys)
        probs = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
        keep = draw(tuple(probs.shape), self.p, probs)
        used = probs
        if keep is not None:
            v.mul_(1 / (1 - self.p))
            used = probs * keep
        return torch.bmm(used, v), (q, k, v, probs, keep, used)

    def backward(self, dctx: Tensor, saved: tuple) -> tuple[Tensor, Tensor, Tensor]:
        """dctx: [B H, Lq, d] -> dq [B H, Lq, d], dk and dv [B H, L, d]."""
        q, k, v, probs, keep, used = saved
        dv = torch.bmm(used.transpose(1, 2), dctx)
        dprobs = torch.bmm(dctx, v.transpose(1, 2))
        if keep is not None:
            dprobs.mul_(keep), dv.mul_(1 / (1 - self.p))
        dscores = aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        return torch.bmm(dscores, k).mul_(q.shape[-1] ** -0.5), torch.bmm(dscores.transpose(1, 2), q), dv


class DeviceAttention(Attention):
    """The same by PyTorch's memory-efficient kernels for GPUs: one launch forward and three backward instead of eleven
    each, dropout included, and no copies of the heads."""

    @staticmethod
    def runs(device: torch.device, dtype: torch.dtype, width: int) -> bool:
        """Whether they are there, for heads of `width`: not on AMD's cards, and in bf16 only from sm_80 on."""
        if device.type != "cuda":
            return True
        able = dtype == torch.float32 or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.version.hip is None and able and width % 8 == 0

    def split(self, x: Tensor, shape: Shape) -> Tensor:
        """[B * T, g * D] -> [g, B, H, T, d], a view."""
        g = x.shape[1] // self.width
        return x.view(shape.b, -1, g, self.heads, self.width // self.heads).permute(2, 0, 3, 1, 4)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, draw: Draw) -> tuple[Tensor, tuple]:
        """q: [B, H, Lq, d]; k, v: [B, H, L, d] -> context [B, H, Lq, d]."""
        keys = shape.hidden_keys.expand(-1, self.heads, q.shape[2], -1)
        p = self.p if draw.training else 0.0
        ctx, *rest = aten._scaled_dot_product_efficient_attention(q, k, v, keys, True, p)
        return ctx, (q, k, v, keys, ctx, *rest, p)

    def backward(self, dctx: Tensor, saved: tuple) -> list[Tensor]:
        """As in the base class; dq, dk and dv lie as q, k and v do in one product's output, where they are as long.

        The keys are not split among blocks, whose sums would come in any order.
        """
        q, k, v, keys, ctx, logsumexp, seed, offset, p = saved
        q, k, v, ctx, dctx = (x.transpose(1, 2) for x in (q, k, v, ctx, dctx))
        found = aten._efficient_attention_backward(
            dctx, q, k, v, keys, ctx, None, None, q.shape[1], k.shape[1], logsumexp, p, seed, offset, 0, False,
            num_splits_key=1, shared_storage_dqdkdv=q.shape == k.shape,
        )  # fmt: skip
        return [x.transpose(1, 2) for x in found[:3]]

    def join(self, heads: Sequence[Tensor], shape: Shape) -> Tensor:
        first, rows, width = heads[0], shape.b * heads[0].shape[2], len(heads) * self.width
        if len(heads) == 3 and first.stride(2) == width and heads[2].storage_offset() == 2 * self.width:
            return first.as_strided((rows, width), (width, 1))
        return super().join(heads, shape)


class Layer:
    """One transformer block. The last one computes the first position (CLS) only, all that the head reads:
    keys and values for every token, the rest for B tokens instead of N. Exact; a seventh of all work."""

    lora: Callable[..., LoraLinear] = LoraLinear
    keys_values: Callable[..., Linear] = Linear  # of the last layer
    attention: type[Attention] = Attention

    def __init__(self, arena: Arena, block: nn.Module, config, last: bool):
        att = block.attention
        self.last, self.dtype, self.p = last, arena.compute.dtype, config.dropout
        self.core = self.attention(config.n_heads, config.dim, config.attention_dropout)
        make = partial(make_linear, arena, lora=self.lora)
        if last:
            self.q, self.kv = make([att.q_lin]), make([att.k_lin, att.v_lin], plain=self.keys_values)
        else:
            self.qkv = make([att.q_lin, att.k_lin, att.v_lin])
        self.out, self.norm1 = make([att.out_lin]), Norm(arena, block.sa_layer_norm)
        self.lin1, self.lin2 = make([block.ffn.lin1]), make([block.ffn.lin2])
        self.norm2 = Norm(arena, block.output_layer_norm)

    @property
    def linears(self) -> list[Linear]:
        return [*((self.q, self.kv) if self.last else (self.qkv,)), self.out, self.lin1, self.lin2]

    def project(self, x: Tensor, shape: Shape, draw: Draw) -> tuple[list[Tensor], list[tuple]]:
        if not self.last:
            qkv, saved = apply(self.qkv, x, draw)
            return list(self.core.split(qkv, shape)), [saved]
        q, saved_q = apply(self.q, x.view(shape.b, shape.length, -1)[:, 0], draw)
        kv, saved_kv = apply(self.kv, x, draw)
        return [*self.core.split(q, shape), *self.core.split(kv, shape)], [saved_q, saved_kv]

    def forward(self, stream: Stream, shape: Shape, draw: Draw) -> tuple[Stream, tuple]:
        """[N, D] fp32 -> [N, D] fp32, or [B, D] from the last layer; and, from fused layers, the same in bf16."""
        x = stream[0]
        heads, saved_in = self.project(x, shape, draw)
        ctx, saved_core = self.core.forward(*heads, shape, draw)
        o, saved_out = apply(self.out, self.core.merge(ctx, shape), draw)
        if self.last:
            x = x.view(shape.b, shape.length, -1)[:, 0]
        h, saved1 = self.norm1.forward(x + o)
        u, saved_u = apply(self.lin1, h, draw)
        f, saved_f = apply(self.lin2, F.gelu(u), draw)
        keep = draw(tuple(f.shape), self.p, f)
        y, saved2 = self.norm2.forward(dropped_add(h, f, keep, self.p))
        return (y, None), (saved_in, saved_core, saved_out, saved1, saved_u, u, saved_f, keep, saved2)

    def backward(self, stream: Stream, saved: tuple, shape: Shape, need_dx: bool) -> Stream | None:
        """The gradient of the output -> that of the input, either as the sum of an fp32 and a bf16 part."""
        dy = total(stream)
        saved_in, saved_core, saved_out, saved1, saved_u, u, saved_f, keep, saved2 = saved
        dz = self.norm2.backward(dy, saved2)
        df = dz.to(self.dtype) if keep is None else (dz * (1 / (1 - self.p))).to(self.dtype).mul_(keep)
        du = aten.gelu_backward(self.lin2.backward(df, saved_f), u)
        dz = self.norm1.backward(dz + self.lin1.backward(du, saved_u), saved1)
        dctx = self.core.split(self.out.backward(dz.to(self.dtype), saved_out), shape)[0]
        return self.project_backward(dz, dctx, saved_core, saved_in, shape, need_dx)

    def merged(self, heads: Sequence[Tensor], shape: Shape) -> Tensor:
        return self.core.join(heads, shape).to(self.dtype)

    def project_backward(self, dz: Tensor, dctx: Tensor, saved_core: tuple, saved_in: list, shape: Shape,
                         need_dx: bool) -> Stream | None:  # fmt: skip
        dq, *dkv = self.core.backward(dctx, saved_core)
        if not self.last:
            dx = self.qkv.backward(self.merged([dq, *dkv], shape), saved_in[0], need_dx)
            return (dz, dx) if need_dx else None
        dcls = self.q.backward(self.merged([dq], shape), saved_in[0], need_dx)
        dx = self.kv.backward(self.merged(dkv, shape), saved_in[1], need_dx)
        if not need_dx:
            return None
        dx = dx.float()
        dx.view(shape.b, shape.length, -1)[:, 0] += dz + dcls
        return dx, None


class DeviceLayer(Layer):
    """As `Layer`, of fewer and larger kernels, where a process has the batch to itself. With several processes the
    masks of dropout are parts of whole batches' masks (see Draw), which these kernels do not take."""

    lora, attention = staticmethod(device_lora), DeviceAttention


class Embedding:
    """Word plus position embeddings, layer norm, dropout."""

    def __init__(self, arena: Arena, module: nn.Module, p: float):
        words = module.word_embeddings
        self.p, self.table, self.pad = p, words.weight, words.padding_idx
        self.position = module.position_embeddings.weight
        self.dposition = arena.grad_view([self.position])
        self.dtable = arena.grad_view([words.weight]) if arena.holds(words.weight) else None
        self.norm = Norm(arena, module.LayerNorm)
        self.trained = any(w.requires_grad for w in module.parameters())

    def forward(self, ids: Tensor, draw: Draw) -> tuple[Tensor, tuple]:
        """ids: [B, L] -> [N, D] fp32."""
        z = F.embedding(ids, self.table.data) + self.position.data[: ids.shape[1]]
        y, saved = self.norm.forward(z.view(ids.numel(), -1))
        keep = draw(tuple(y.shape), self.p, y)
        return y if keep is None else y.mul_(keep).mul_(1 / (1 - self.p)), (ids, keep, saved)

    def backward(self, dy: Tensor, saved: tuple) -> tuple[Tensor, Tensor] | None:
        """Position and norm gradients go to the arena, the table's too if it is there; else that is returned: unique
        ids [U], gradient [U, D]."""
        ids, keep, saved_norm = saved
        if keep is not None:
            dy = (dy * keep).mul_(1 / (1 - self.p))
        dz = self.norm.backward(dy, saved_norm)
        if self.dposition is not None:
            self.dposition.zero_()
            torch.sum(dz.view(*ids.shape, -1), 0, out=self.dposition[: ids.shape[1]])
        if not self.table.requires_grad:
            return None
        if self.dtable is not None:
            pad = -1 if self.pad is None else self.pad
            put(self.dtable, aten.embedding_dense_backward(dz.view(*ids.shape, -1), ids, len(self.table), pad, False))
            return None
        rows, index = torch.unique(ids, return_inverse=True)
        grad = dz.new_zeros(len(rows), dz.shape[1]).index_add_(0, index.view(-1), dz)
        if self.pad is not None:
            grad *= (rows != self.pad)[:, None]
        return rows, grad


class Head:
    """What makes logits of the CLS state: relu(x W1' + b1), dropout, and a product with W2, in fp32."""

    def __init__(self, arena: Arena, modules: list[nn.Linear], p: float):
        params = [(module.weight, module.bias) for module in modules]
        (self.w1, self.b1), (self.w2, self.b2) = ((weight.data, bias.data) for weight, bias in params)
        (self.dw1, self.db1), (self.dw2, self.db2) = (
            (arena.grad_view([weight]), arena.grad_view([bias])) for weight, bias in params
        )
        self.arena, self.p = arena, p

    def forward(self, cls: Tensor, draw: Draw) -> tuple[Tensor, tuple]:
        """[B, D] -> logits [B, C]."""
        h = torch.addmm(self.b1, cls, self.w1.t()).relu_()
        keep = draw(tuple(h.shape), self.p, h)
        used = h if keep is None else (h * keep).mul_(1 / (1 - self.p))
        return torch.addmm(self.b2, used, self.w2.t()), (cls, h, keep, used)

    def backward(self, dy: Tensor, saved: tuple) -> Tensor:
        cls, h, keep, used = saved
        dh = (dy @ self.w2).mul_(h > 0)
        if keep is not None:
            dh.mul_(keep).mul_(1 / (1 - self.p))

        def weights() -> None:
            put(self.dw2, dy.t() @ used), put(self.db2, dy.sum(0))
            put(self.dw1, dh.t() @ cls), put(self.db1, dh.sum(0))

        self.arena.aside(weights)
        return dh @ self.w1
