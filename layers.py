"""The parts of fast.py: layers with forward and backward written out, over parameters in one flat buffer.

Shapes: B sequences, L tokens each (padded on the right), N = B * L, D width, H heads, d = D / H, r rank.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


def base_layer(module: nn.Module) -> nn.Linear:
    return getattr(module, "base_layer", module)


class Arena:
    """Parameters moved into one flat fp32 buffer, [decayed | plain | frozen], with flat gradient and bf16 copy.

    The module's parameters become views, so saving and loading see nothing new. One buffer each means one
    fused AdamW, one gradient norm, one all-reduce and one cast to bf16 a step, and q, k, v as one product.
    """

    def __init__(self, params: list[nn.Parameter], by_autograd: list[nn.Parameter], dtype: torch.dtype):
        self.by_autograd = [p for p in by_autograd if p.requires_grad]  # autograd adds their gradients itself
        self.decayed = [p for p in params if p.requires_grad and p.ndim >= 2]
        self.plain = [p for p in params if p.requires_grad and p.ndim < 2]
        self.params = self.decayed + self.plain + [p for p in params if not p.requires_grad]
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.params])
        self.trained = sum(p.numel() for p in self.decayed + self.plain)
        self.grad = torch.zeros_like(self.flat[: self.trained])
        self.compute = self.flat if dtype == torch.float32 else self.flat.to(dtype)
        self.offsets, start = {}, 0
        for p in self.params:
            self.offsets[id(p)] = start
            p.data = self.view(self.flat, [p])
            start += p.numel()
        self.grads = [(p, self.view(self.grad, [p])) for p in self.decayed + self.plain]
        self.listeners: list = []  # called after `compute` changed
        self.versions = self._versions()
        self.reset_grad()

    def view(self, buffer: Tensor, params: list[nn.Parameter]) -> Tensor:
        """`params`, neighbours of one shape, as one view of `buffer`, stacked along their first dimension."""
        start, size = self.offsets[id(params[0])], params[0].numel()
        if [self.offsets[id(p)] for p in params] != [start + i * size for i in range(len(params))]:
            raise ValueError("these parameters are not neighbours")
        return buffer[start : start + size * len(params)].view(-1, *params[0].shape[1:])

    def grad_view(self, params: list[nn.Parameter]) -> Tensor | None:
        return self.view(self.grad, params) if params[0].requires_grad else None

    def reset_grad(self) -> None:
        """The next backward overwrites instead of adding: no pass over the gradient to fill it with zeros."""
        self.fresh = True
        for p, view in self.grads:
            p.grad = view
        for p in self.by_autograd:
            p.grad.zero_()

    def put(self, target: Tensor | None, value: Tensor) -> None:
        if target is not None:
            target.copy_(value) if self.fresh else target.add_(value)

    def _versions(self) -> int:
        return sum(p._version for p in self.params)

    def sync(self) -> None:
        """Refresh the bf16 copy: once a step, where autocast casts at every use."""
        if self.compute is not self.flat:
            self.compute[: self.trained].copy_(self.flat[: self.trained])
        for listener in self.listeners:
            listener()
        self.versions = self._versions()

    def sync_if_changed(self) -> None:
        """After somebody else wrote to the parameters (load_state_dict, another optimiser)."""
        if self.versions != self._versions():
            self.compute.copy_(self.flat)
            self.sync()


class Draw:
    """Dropout masks, 0 or 1, from torch's generator.

    One int64 draw makes eight decisions, where `bernoulli_` makes one. A byte alone would round p to 1/256,
    so each column's threshold is itself drawn between the two neighbours: every element is dropped with
    probability p (to 1/65536), and two elements of a column are correlated by less than 1e-4. With several
    processes each draws the masks of the whole global batch and keeps its own rows, so that the result
    doesn't depend on their number (the batches must be padded to one length).
    """

    def __init__(self, training: bool, rows: int = 1, first: int = 0, whole: int | None = None) -> None:
        """For `rows` rows of a batch of `whole`, from the one at `first` on."""
        self.training, self.rows, self.first, self.whole = training, rows, first, whole or rows

    def __call__(self, shape: tuple[int, ...], p: float, like: Tensor, groups: int = 1) -> Tensor | None:
        """0/1 mask of `shape` in `like`'s dtype, whose first dimension (within each of `groups`) is the batch's."""
        if not self.training or p == 0:
            return None
        per_row, low = math.prod(shape) // (groups * self.rows), math.floor(p * 256)
        coin = self._bits(2 * shape[-1], like.device).view(torch.int16)[: shape[-1]]
        limit = (coin < round((p * 256 - low) * 65536) - 32768).to(torch.int8).add_(low - 128)
        bits = self._bits(n := groups * self.whole * per_row, like.device)[:n].view(groups, self.whole, per_row)
        bits = bits[:, self.first : self.first + self.rows].reshape(shape)
        return torch.ge(bits, limit, out=torch.empty(shape, dtype=like.dtype, device=like.device))

    @staticmethod
    def _bits(size: int, device: torch.device) -> Tensor:
        """At least `size` uniform bytes, as int8."""
        return torch.empty(-(-size // 8), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int8)


class Linear:
    """One or more nn.Linear modules reading the same input, as one product."""

    def __init__(self, arena: Arena, modules: list[nn.Module]):
        weights, biases = [base_layer(m).weight for m in modules], [base_layer(m).bias for m in modules]
        self.arena = arena
        self.weight, self.bias = arena.view(arena.compute, weights), arena.view(arena.compute, biases)
        self.dweight, self.dbias = arena.grad_view(weights), arena.grad_view(biases)

    def buffer(self, n: int) -> tuple[Tensor, Tensor]:
        """What `forward` takes, and the part of it [n, in] the caller fills."""
        x = self.weight.new_empty(n, self.weight.shape[1])
        return x, x

    def forward(self, x: Tensor, draw: Draw) -> tuple[Tensor, tuple]:
        return torch.addmm(self.bias, x, self.weight.t()), (x,)  # [N, out]

    def backward(self, dy: Tensor, saved: tuple, need_dx: bool = True) -> Tensor | None:
        if self.dweight is not None:
            self.arena.put(self.dweight, dy.t() @ saved[0])
            self.arena.put(self.dbias, dy.sum(0))
        return dy @ self.weight if need_dx else None  # [N, in]


class LoraLinear(Linear):
    """The same with G of the modules adapted: y = x W' + b + scaling * B A (keep * x) / (1 - p), base frozen.

    The input is extended to [x | h | 1] and the weight to [W | scaling B | b]: one product does the base
    layer, all G up-projections and the bias.
    """

    def __init__(self, arena: Arena, modules: list[nn.Module]):
        super().__init__(arena, modules)
        name = next(m for m in modules if hasattr(m, "lora_A")).active_adapters[0]
        self.parts = [i for i, m in enumerate(modules) if hasattr(m, "lora_A")]
        adapted = [modules[i] for i in self.parts]
        down, up = [m.lora_A[name].weight for m in adapted], [m.lora_B[name].weight for m in adapted]
        self.r, self.p = down[0].shape[0], getattr(adapted[0].lora_dropout[name], "p", 0.0)
        self.scaling = [m.scaling[name] for m in adapted]
        self.down = arena.view(arena.compute, down).view(len(down), self.r, -1)  # [G, r, in]
        self.ddown, self.dup = arena.grad_view(down), [arena.grad_view([p]) for p in up]
        self.up = [arena.view(arena.compute, [p]) for p in up]  # G x [out / n, r]
        rank, (out, width) = len(adapted) * self.r, self.weight.shape
        self.block = self.weight.new_zeros(out, rank)  # scaling * B of each part, block by block
        self.width, padding = width, -(rank + 1) % 32  # whole tiles
        self.joint = width <= out  # else the copy into the longer input costs more than a second product
        self.wide = torch.cat([self.weight, self.block, self.bias[:, None], self.weight.new_zeros(out, padding)], 1)
        self.tail = torch.cat([self.weight.new_ones(1), self.weight.new_zeros(padding)])
        arena.listeners.append(self.refresh)
        self.refresh()

    def slots(self):
        """(part, its rows of the output, its columns of the block)."""
        out = self.up[0].shape[0]
        for g, i in enumerate(self.parts):
            yield g, slice(i * out, (i + 1) * out), slice(g * self.r, (g + 1) * self.r)

    def refresh(self) -> None:
        for g, rows, columns in self.slots():
            torch.mul(self.up[g], self.scaling[g], out=self.block[rows, columns])
        self.wide[:, self.width : self.width + self.block.shape[1]] = self.block

    def buffer(self, n: int) -> tuple[Tensor, Tensor]:
        if not self.joint:
            return super().buffer(n)
        wide = self.wide.new_empty(n, self.wide.shape[1])
        wide[:, self.width + self.block.shape[1] :] = self.tail
        return wide, wide[:, : self.width]

    def forward(self, wide: Tensor, draw: Draw) -> tuple[Tensor, tuple]:
        x, groups = wide[:, : self.width], len(self.parts)
        keep = draw((groups, *x.shape), self.p, x, groups)
        xd = x.expand(groups, *x.shape) if keep is None else x * keep  # [G, N, in]
        h = torch.bmm(xd, self.down.transpose(1, 2)).transpose(0, 1)  # [N, G, r]
        h = torch.mul(h, 1.0 if keep is None else 1 / (1 - self.p)).reshape(len(x), -1)
        if not self.joint:
            return torch.addmm(self.bias, x, self.weight.t()).addmm_(h, self.block.t()), (h, xd, keep)
        wide[:, self.width : self.width + h.shape[1]] = h
        return wide @ self.wide.t(), (h, xd, keep)

    def backward(self, dy: Tensor, saved: tuple, need_dx: bool = True) -> Tensor | None:
        h, xd, keep = saved
        dup = h.t() @ dy  # [G r, out], of which the blocks count
        for g, rows, columns in self.slots():
            self.arena.put(self.dup[g], dup[columns, rows].t() * self.scaling[g])
        dh = (dy @ self.block).view(len(dy), -1, self.r).transpose(0, 1)  # [G, N, r]
        dh = dh.contiguous() if keep is None else dh * (1 / (1 - self.p))
        self.arena.put(self.ddown, torch.bmm(dh.transpose(1, 2), xd).flatten(0, 1))
        if not need_dx:
            return None
        dxd = torch.bmm(dh, self.down)  # [G, N, in]
        if keep is not None:
            dxd.mul_(keep)
        dx = dxd[0]
        for other in dxd[1:]:
            dx.add_(other)
        return dx.addmm_(dy, self.weight)


def apply(linear: Linear, x: Tensor, draw: Draw) -> tuple[Tensor, tuple]:
    """x: [n, in], any dtype; the cast is the copy into the product's input."""
    if x.dtype == linear.weight.dtype and x.is_contiguous() and not getattr(linear, "joint", False):
        return linear.forward(x, draw)
    full, part = linear.buffer(len(x))
    part.copy_(x)
    return linear.forward(full, draw)


def _linear(arena: Arena, modules: list[nn.Module]) -> Linear:
    return (LoraLinear if any(hasattr(m, "lora_A") for m in modules) else Linear)(arena, modules)


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
        train = self.dweight is not None
        dz, dw, db = aten.native_layer_norm_backward(
            dy, z, [z.shape[-1]], mean, rstd, self.weight, self.bias, [True, train, train]
        )
        if train:
            self.arena.put(self.dweight, dw), self.arena.put(self.dbias, db)
        return dz


def dropped_add(x: Tensor, y: Tensor, keep: Tensor | None, p: float) -> Tensor:
    """x + dropout(y), x fp32; `y` may be overwritten."""
    return x + y if keep is None else torch.add(x, y.mul_(keep), alpha=1 / (1 - p))


@dataclass
class Shape:
    """What the layers need to know about a batch."""

    b: int  # B
    length: int  # L
    hidden_keys: Tensor | None  # [B, 1, 1, L]: -inf at padding; None where nothing is padded


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

    def merge(self, x: Tensor, shape: Shape, out: Tensor) -> Tensor:
        """[g, B * H, T, d] -> `out` [B * T, g * D], one copy with the cast."""
        g, _, t, d = x.shape
        parts = x.view(g, shape.b, self.heads, t, d).permute(1, 3, 0, 2, 4)  # [B, T, g, H, d]
        out.unflatten(0, (shape.b, t)).unflatten(2, (g, self.heads, d)).copy_(parts)
        return out

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

    def backward(self, dctx: Tensor, saved: tuple, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """dctx: [B H, Lq, d]; writes dq [B H, Lq, d], dk and dv [B H, L, d]."""
        q, k, v, probs, keep, used = saved
        torch.bmm(used.transpose(1, 2), dctx, out=dv)
        dprobs = torch.bmm(dctx, v.transpose(1, 2))
        if keep is not None:
            dprobs.mul_(keep), dv.mul_(1 / (1 - self.p))
        dscores = aten._softmax_backward_data(dprobs, probs, -1, probs.dtype)
        torch.bmm(dscores, k, out=dq).mul_(q.shape[-1] ** -0.5)
        torch.bmm(dscores.transpose(1, 2), q, out=dk)


class Layer:
    """One transformer block. The last one computes the first position (CLS) only, all that the head reads:
    keys and values for every token, the rest for B tokens instead of N. Exact; a seventh of all work."""

    def __init__(self, arena: Arena, block: nn.Module, config, last: bool):
        att = block.attention
        self.last, self.dtype, self.p = last, arena.compute.dtype, config.dropout
        self.core = Attention(config.n_heads, config.dim, config.attention_dropout)
        if last:
            self.q, self.kv = _linear(arena, [att.q_lin]), _linear(arena, [att.k_lin, att.v_lin])
        else:
            self.qkv = _linear(arena, [att.q_lin, att.k_lin, att.v_lin])
        self.out, self.norm1 = _linear(arena, [att.out_lin]), Norm(arena, block.sa_layer_norm)
        self.lin1, self.lin2 = _linear(arena, [block.ffn.lin1]), _linear(arena, [block.ffn.lin2])
        self.norm2 = Norm(arena, block.output_layer_norm)

    def project(self, x: Tensor, shape: Shape, draw: Draw) -> tuple[list[Tensor], list[tuple]]:
        if not self.last:
            qkv, saved = apply(self.qkv, x, draw)
            return list(self.core.split(qkv, shape)), [saved]
        q, saved_q = apply(self.q, x.view(shape.b, shape.length, -1)[:, 0], draw)
        kv, saved_kv = apply(self.kv, x, draw)
        return [*self.core.split(q, shape), *self.core.split(kv, shape)], [saved_q, saved_kv]

    def forward(self, x: Tensor, shape: Shape, draw: Draw) -> tuple[Tensor, tuple]:
        """x: [N, D] fp32 -> [N, D] fp32, or [B, D] from the last layer."""
        heads, saved_in = self.project(x, shape, draw)
        ctx, saved_core = self.core.forward(*heads, shape, draw)
        full, merged = self.out.buffer(shape.b * ctx.shape[1])
        self.core.merge(ctx[None], shape, merged)
        o, saved_out = self.out.forward(full, draw)
        if self.last:
            x = x.view(shape.b, shape.length, -1)[:, 0]
        h, saved1 = self.norm1.forward(x + o)
        u, saved_u = apply(self.lin1, h, draw)
        f, saved_f = apply(self.lin2, F.gelu(u), draw)
        keep = draw(tuple(f.shape), self.p, f)
        y, saved2 = self.norm2.forward(dropped_add(h, f, keep, self.p))
        return y, (saved_in, saved_core, saved_out, saved1, saved_u, u, saved_f, keep, saved2)

    def backward(self, dy: Tensor, saved: tuple, shape: Shape, need_dx: bool) -> Tensor | None:
        saved_in, saved_core, saved_out, saved1, saved_u, u, saved_f, keep, saved2 = saved
        dz = self.norm2.backward(dy, saved2)
        df = dz.to(self.dtype) if keep is None else (dz * (1 / (1 - self.p))).to(self.dtype).mul_(keep)
        du = aten.gelu_backward(self.lin2.backward(df, saved_f), u)
        dz = self.norm1.backward(dz + self.lin1.backward(du, saved_u), saved1)
        dctx = self.core.split(self.out.backward(dz.to(self.dtype), saved_out), shape)[0]
        return self.project_backward(dz, dctx, saved_core, saved_in, shape, need_dx)

    def merged(self, x: Tensor, shape: Shape) -> Tensor:
        g, _, t, _ = x.shape
        out = torch.empty(shape.b * t, g * self.core.width, dtype=self.dtype, device=x.device)
        return self.core.merge(x, shape, out)

    def project_backward(self, dz: Tensor, dctx: Tensor, saved_core: tuple, saved_in: list, shape: Shape,
                         need_dx: bool) -> Tensor | None:  # fmt: skip
        k = saved_core[1]
        if not self.last:
            grads = torch.empty(3, *k.shape, dtype=k.dtype, device=k.device)
            self.core.backward(dctx, saved_core, *grads)
            dx = self.qkv.backward(self.merged(grads, shape), saved_in[0], need_dx)
            return dz + dx if need_dx else None
        dq, dkv = torch.empty_like(dctx), torch.empty(2, *k.shape, dtype=k.dtype, device=k.device)
        self.core.backward(dctx, saved_core, dq, *dkv)
        dcls = self.q.backward(self.merged(dq[None], shape), saved_in[0], need_dx)
        dx = self.kv.backward(self.merged(dkv, shape), saved_in[1], need_dx)
        if not need_dx:
            return None
        dx = dx.float()
        dx.view(shape.b, shape.length, -1)[:, 0] += dz + dcls
        return dx


class Embedding:
    """Word plus position embeddings, layer norm, dropout."""

    def __init__(self, arena: Arena, module: nn.Module, p: float):
        words = module.word_embeddings
        self.arena, self.p, self.table, self.pad = arena, p, words.weight, words.padding_idx
        self.position = module.position_embeddings.weight
        self.dposition = arena.grad_view([self.position])
        self.norm = Norm(arena, module.LayerNorm)
        self.trained = any(w.requires_grad for w in module.parameters())

    def forward(self, ids: Tensor, draw: Draw) -> tuple[Tensor, tuple]:
        """ids: [B, L] -> [N, D] fp32."""
        z = F.embedding(ids, self.table.data) + self.position.data[: ids.shape[1]]
        y, saved = self.norm.forward(z.view(ids.numel(), -1))
        keep = draw(tuple(y.shape), self.p, y)
        return y if keep is None else y.mul_(keep).mul_(1 / (1 - self.p)), (ids, keep, saved)

    def backward(self, dy: Tensor, saved: tuple) -> tuple[Tensor, Tensor] | None:
        """Position and norm gradients go to the arena; returns the table's: unique ids [U], gradient [U, D]."""
        ids, keep, saved_norm = saved
        if keep is not None:
            dy = (dy * keep).mul_(1 / (1 - self.p))
        dz = self.norm.backward(dy, saved_norm)
        if self.dposition is not None:
            if self.arena.fresh:
                self.dposition.zero_()
            self.dposition[: ids.shape[1]] += dz.view(*ids.shape, -1).sum(0)
        if not self.table.requires_grad:
            return None
        rows, index = torch.unique(ids, return_inverse=True)
        grad = dz.new_zeros(len(rows), dz.shape[1]).index_add_(0, index.view(-1), dz)
        if self.pad is not None:
            grad *= (rows != self.pad)[:, None]
        return rows, grad
