"""A transformer block whose work between matrix products is done by the compiled kernels: layers.Layer, faster."""

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

import kernels
from dropout import NOTHING, Draw, Dropout
from first import FirstAttention, KeysValues
from layers import Head, Layer, Norm, Shape, Stream
from linear import Arena, Linear, LoraLinear, base_layer
from tape import empty
from tiles import packs


class FusedLoraLinear(LoraLinear):
    """As `LoraLinear`, with the skinny products and their dropout in two kernels, fp32, straight from x and the
    random bytes: no masked copy of x per adapter. The base layer's product brings the adapters' gradient along."""

    way_down, way_up = "lora_down", "lora_up_gradient_floats"

    def __init__(self, arena: Arena, modules: list[nn.Module]):
        super().__init__(arena, modules)
        self.joint = True  # whoever makes x writes it into the longer input

    @cached_property
    def matrices(self) -> Tensor:
        """A as the way down reads it, filled up to whole vectors: [G, in, whole(r)], fp32."""
        return torch.zeros(len(self.parts), self.width, kernels.whole(self.r))

    @cached_property
    def padded(self) -> Tensor:
        """A as the way back reads it: [G, r, whole(in)], fp32."""
        return torch.zeros(len(self.parts), self.r, kernels.whole(self.width))

    def refresh(self) -> None:
        kernels.call("lora_follow", self.wide.dtype, self.wide.shape[1], self.width, self.up[0].shape[0], self.r,
                     len(self.parts), self.offsets, self.factors, self.ups, self.wide, self.wide_down, self.matrices,
                     self.padded)  # fmt: skip

    def buffer(self, n: int) -> tuple[Tensor, Tensor]:
        wide = empty(n, self.wide.shape[1], dtype=self.wide.dtype)
        return wide, wide[:, : self.width]

    def extend(self, wide: Tensor, draw: Draw) -> Dropout:
        """Write h behind x in wide [N, in + G r and zeros]."""
        n, h = len(wide), wide[:, self.width :]
        drop = draw.dropout((len(self.parts), n, self.width), self.p, wide.device, len(self.parts))
        kernels.call(self.way_down, wide.dtype, n, self.width, self.r, len(self.parts), wide, wide.stride(0),
                     self.matrices, *drop, h, wide.stride(0), h.shape[1] - len(self.parts) * self.r)  # fmt: skip
        return drop

    def forward(self, wide: Tensor, draw: Draw, bias: bool = True) -> tuple[Tensor, tuple]:
        drop, y = self.extend(wide, draw), self.matrix.forward(wide)
        return y.add_(self.bias) if bias else y, (wide, drop)

    def backward(self, dy: Tensor, saved: tuple, need_dx: bool = True, need_bias: bool = True) -> Tensor | None:
        """Where nobody reads dx, of the product with W there is left what brings the adapters' gradient: of a step with
        the last two layers, 1 ms of 15."""
        wide, drop = saved
        self.put_up(wide[:, self.width :], dy)
        dwide = self.matrix.backward(dy, 0 if need_dx else self.width)
        return self.down_backward(wide, drop, dwide, need_dx)

    def down_backward(self, wide: Tensor, drop: Dropout, dwide: Tensor, need_dx: bool) -> Tensor | None:
        """The gradient of [x | h], or of h alone where nobody reads dx -> that of x [N, in], in the same memory; and
        A's, to its place."""
        dx, dh = dwide[:, : self.width] if need_dx else None, dwide[:, -(self.wide.shape[1] - self.width) :]
        self.down_gradients(wide, drop, dh, dx)
        return dx

    def down_gradients(self, wide: Tensor, drop: Dropout, dh: Tensor, dx: Tensor | None) -> None:
        ddown = self.ddown if self.ddown.dtype == torch.float32 else torch.empty(self.ddown.shape)
        kernels.call("lora_backward", wide.dtype, len(wide), self.width, self.r, len(self.parts), wide, wide.stride(0),
                     self.padded, *drop, dh, dx, dh.stride(0), ddown)  # fmt: skip
        if ddown is not self.ddown:
            self.ddown.copy_(ddown)

    @cached_property
    def offsets(self) -> Tensor:
        """Where the outputs of the adapted modules begin."""
        return torch.tensor(self.parts) * self.up[0].shape[0]

    @cached_property
    def factors(self) -> Tensor:
        return torch.tensor(self.scaling)

    def put_up(self, h: Tensor, dy: Tensor) -> None:
        if not self.recordable:
            return super().put_up(h, dy)
        kernels.call(self.way_up, dy.dtype, len(dy), self.up[0].shape[0], self.r, len(self.parts), self.offsets,
                     self.factors, dy, dy.stride(0), h, h.stride(0), self.dups)  # fmt: skip

    def targets(self) -> Iterator[tuple[int, int, int, float, Tensor]]:
        """As those of `KeysValues`: the gradients of the matrices B."""
        for g, part in enumerate(self.parts):
            yield part, self.width + g * self.r, self.r, self.scaling[g], self.dup[g]


class TiledLoraLinear(FusedLoraLinear):
    """As `FusedLoraLinear`, on tiles (products.h), with A in bf16 as PEFT has it under autocast."""

    way_down, way_up = "lora_down_tiles", "lora_up_gradient"

    @property
    def matrices(self) -> Tensor:
        return self.down

    def refresh(self) -> None:
        each, matrix = self.up[0].shape[0], self.matrix
        kernels.call("lora_refresh", self.wide.dtype, *self.wide.shape, self.width, each, self.r, len(self.parts),
                     self.offsets, self.factors, self.ups, self.wide, matrix.packed, matrix.packed_back)  # fmt: skip

    def down_gradients(self, wide: Tensor, drop: Dropout, dh: Tensor, dx: Tensor | None) -> None:
        kernels.call("lora_backward_tiles", wide.dtype, len(wide), self.width, self.r, len(self.parts), wide,
                     wide.stride(0), self.matrices, *drop, dh, dx, dh.stride(0), self.ddown)  # fmt: skip


def fused_lora(arena: Arena, modules: list[nn.Module]) -> FusedLoraLinear:
    weight = arena.view(arena.compute, [base_layer(modules[0]).weight])
    return (TiledLoraLinear if packs(weight) else FusedLoraLinear)(arena, modules)


class FusedHead(Head):
    """As `Head`, on CPU, a kernel each way: 1.29 to 0.78 ms a step of 16 texts."""

    def forward(self, cls: Tensor, draw: Draw) -> tuple[Tensor, tuple]:
        sizes, drop = (*cls.shape, len(self.w2)), draw.dropout(tuple(cls.shape), self.p, cls.device)
        used, logits = torch.empty_like(cls), cls.new_empty(len(cls), len(self.w2))
        kernels.call("head", cls.dtype, *sizes, cls, self.w1, self.b1, self.w2, self.b2, *drop, used, logits)
        return logits, (sizes, cls, used, drop[-1])

    def backward(self, dy: Tensor, saved: tuple) -> Tensor:
        sizes, cls, used, scale = saved
        dy, dx = dy.contiguous(), torch.empty_like(cls)
        kernels.call("head_backward", cls.dtype, *sizes, cls, self.w1, self.w2, used, scale, dy, dx, self.dw1, self.db1,
                     self.dw2, self.db2)  # fmt: skip
        return dx


class FusedLayer(Layer):
    """As `Layer`, on CPU. Sums, norms, dropout, gelu and attention read and write each number once, and whoever
    makes a number leaves it where the next product reads it, in its type: 83 to 60 ms a step of 16 x 27 tokens."""

    lora, keys_values = staticmethod(fused_lora), KeysValues
    successor: "FusedLayer | None" = None  # the layer that reads the output

    def __init__(self, arena: Arena, block: nn.Module, config, last: bool):
        super().__init__(arena, block, config, last)
        self.heads, self.width = config.n_heads, config.dim
        if last:
            self.first = FirstAttention(self.q, self.kv, self.heads, config.attention_dropout)
        else:
            self.biases = self.qkv.wide_bias.split(self.width)

    @property
    def entry(self) -> Linear:
        """The product over all of the input's tokens."""
        return self.kv if self.last else self.qkv

    def _add_norm(
        self, x: Tensor, y: Tensor, linear: Linear, drop: Dropout, norm: Norm, reader: Linear | None
    ) -> tuple[Tensor, Tensor | None, tuple]:
        """norm(x + dropout(y + bias)), y from `linear`; in fp32 and as the input of `reader`'s product."""
        n, d = y.shape
        z, h, mean, rstd = empty(n, d), empty(n, d), empty(n), empty(n)
        full, part = reader.buffer(n) if reader else (None, None)
        stride = part.stride(0) if reader else 0
        kernels.call("add_norm", self.dtype, n, d, x, x.stride(0), y, linear.wide_bias, *drop, norm.weight,
                     norm.bias, norm.eps, z, h, part, stride, mean, rstd)  # fmt: skip
        return h, full, (z, mean, rstd)

    def _add_norm_backward(
        self, stream: Stream, saved: tuple, drop: Dropout, norm: Norm, linear: Linear
    ) -> tuple[Tensor, Tensor]:
        """-> gradient of x, fp32, and of y, the output of `linear`, whose bias gets its gradient here."""
        (dy, more), (z, mean, rstd) = stream, saved
        dx, half = empty(*z.shape), empty(*z.shape, dtype=self.dtype)
        stride = 0 if more is None else more.stride(0)
        kernels.call("add_norm_backward", self.dtype, *z.shape, dy, more, stride, z, mean, rstd, norm.weight, *drop,
                     dx, half, norm.dweight, norm.dbias, linear.dbias)  # fmt: skip
        return dx, half

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, shape: Shape, draw: Draw) -> tuple[Tensor, tuple]:
        """q, k, v: [B L, D], views of wider rows -> the input of the output projection."""
        full, part = self.out.buffer(len(q))
        drop = draw.dropout((shape.b * self.heads, shape.length, shape.length), self.core.p, q.device)
        norms = empty(shape.b * self.heads * shape.length, 2)
        sizes = (shape.b, self.heads, shape.length, self.width // self.heads, q.stride(0))
        heads = (*sizes, shape.lengths, q, k, v, *self.biases, *drop)
        kernels.call("attend", self.dtype, *heads, part, part.stride(0), norms)
        return full, (heads, norms)

    def _attend_backward(self, dcontext: Tensor, saved: tuple, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """dcontext: [B L, D]; dq, dk and dv are laid out as q, k and v were."""
        heads, norms = saved
        kernels.call("attend_backward", self.dtype, *heads, norms, dcontext, dcontext.stride(0), dq, dk, dv)

    def _cast(self, x: Tensor, reader: Linear) -> Tensor:
        """x [n, D] as the input of `reader`'s product."""
        full, part = reader.buffer(len(x))
        kernels.call("cast", self.dtype, *x.shape, x, x.stride(0), part, part.stride(0))
        return full

    def _bias(self, linear: Linear, dy: Tensor) -> None:
        if linear.dbias is not None:
            kernels.call("column_sums", self.dtype, *dy.shape, dy, linear.dbias)

    def forward(self, stream: Stream, shape: Shape, draw: Draw) -> tuple[Stream, list]:
        x, full = stream
        if full is None:
            full = self._cast(x, self.entry)
        if self.last:
            x = x.view(shape.b, shape.length, -1)[:, 0]
            q, saved_in = self.q.forward(self._cast(x, self.q), draw, bias=False)
            wide, (full, part) = full, self.out.buffer(shape.b)
            saved_core = self.first.forward(q, wide, part, shape, draw)
        else:
            product, saved_in = self.entry.forward(full, draw, bias=False)
            full, saved_core = self._attend(*product.split(self.width, 1), shape, draw)
        y, saved_out = self.out.forward(full, draw, bias=False)
        h, full, saved1 = self._add_norm(x, y, self.out, NOTHING, self.norm1, self.lin1)
        u, saved_u = self.lin1.forward(full, draw, bias=False)
        full, part = self.lin2.buffer(len(u))
        kernels.call("gelu", self.dtype, *u.shape, u, self.lin1.wide_bias, part, part.stride(0))  # u: now the slope
        y, saved_f = self.lin2.forward(full, draw, bias=False)
        drop = draw.dropout(tuple(y.shape), self.p, y.device)
        y, full, saved2 = self._add_norm(h, y, self.lin2, drop, self.norm2, self.successor and self.successor.entry)
        return (y, full), [saved_in, saved_core, saved_out, saved1, saved_u, u, saved_f, drop, saved2]

    def backward(self, stream: Stream, saved: list, shape: Shape, need_dx: bool) -> Stream | None:
        """Empties `saved`: whatever has been read makes room for the next gradient."""
        dz, d = self._add_norm_backward(stream, saved.pop(), saved.pop(), self.norm2, self.lin2)
        d = self.lin2.backward(d, saved.pop(), need_bias=False)
        kernels.call("gelu_backward", self.dtype, *d.shape, saved.pop(), d, d.stride(0), self.lin1.dbias)
        d = self.lin1.backward(d, saved.pop(), need_bias=False)
        dz, d = self._add_norm_backward((dz, d), saved.pop(), NOTHING, self.norm1, self.out)
        dcontext = self.out.backward(d, saved.pop(), need_bias=False)
        saved_in, saved_core = saved
        del d
        if not self.last:
            dqkv = empty(shape.b * shape.length, 3 * self.width, dtype=self.dtype)
            self._attend_backward(dcontext, saved_core, *dqkv.split(self.width, 1))
            self._bias(self.qkv, dqkv)
            dx = self.qkv.backward(dqkv, saved_in, need_dx, need_bias=False)
            return (dz, dx) if need_dx else None
        dq, dx = self.first.backward(dcontext, saved_core, shape, need_dx)
        self._bias(self.q, dq)
        dcls = self.q.backward(dq, saved_in, need_dx, need_bias=False)
        if not need_dx:
            return None
        whole = empty(*dx.shape)
        kernels.call("add_first", self.dtype, shape.b, shape.length, self.width, dx, dx.stride(0), dz, dcls,
                     dcls.stride(0), whole)  # fmt: skip
        return whole, None
