"""The last layer's attention, of which the head reads one row a sequence: no keys and values are made (see first.h)."""

from collections.abc import Iterator

from torch import Tensor

import kernels
from dropout import NOTHING, Draw, Dropout
from layers import Shape
from linear import Linear
from tape import empty


class KeysValues(Linear):
    """The weights of keys and values, one below the other, which are read as they are."""

    recordable = True

    def prepare(self) -> None:
        """Nothing: there is no product with them over all tokens."""

    @property
    def wide(self) -> Tensor:
        """[2 D, in]: what to multiply the input with, or whatever `extend` makes of it."""
        return self.weight

    def extend(self, x: Tensor, draw: Draw) -> Dropout:
        """Write what adapters need of x [N, in] behind it: here there are none."""
        return NOTHING

    def targets(self) -> Iterator[tuple[int, int, int, float, Tensor]]:
        """Keys or values (0 or 1), first column of `wide`, columns, factor, where: gradients that are wanted."""
        if self.dweight is not None:
            half, width = len(self.weight) // 2, self.weight.shape[1]
            yield from ((part, 0, width, 1.0, self.dweight[part * half :]) for part in (0, 1))

    def down_backward(self, x: Tensor, drop: Dropout, dx: Tensor | None, need_dx: bool) -> Tensor | None:
        """The gradient of x behind `extend` -> that before it."""
        return dx


class FirstAttention:
    """Attention of the first of L tokens over all of them. D: width. A step of the last layer alone takes 13.3 ms with
    keys and values and 9.9 without, one of the last two 53.7 and 46.4 (fp32, AVX2)."""

    def __init__(self, q: Linear, kv: Linear, heads: int, p: float):
        self.kv, self.heads, self.p, self.width = kv, heads, p, len(q.weight)
        self.q_bias, self.v_bias = q.wide_bias, kv.wide_bias[self.width :]

    def room(self, shape: Shape) -> Tensor:
        """For a row as wide as the input, and filled up to whole vectors, of each head; and one vector more."""
        return empty(shape.b * self.heads * kernels.whole(self.kv.wide.shape[1]) + kernels.WIDTH)

    def forward(self, q: Tensor, x: Tensor, context: Tensor, shape: Shape, draw: Draw) -> tuple:
        """q [B, D], the input x [B L, in] -> context [B, D], and what backward needs."""
        down = self.kv.extend(x, draw)
        drop = draw.dropout((shape.b * self.heads, 1, shape.length), self.p, x.device)
        sizes = (shape.b, self.heads, shape.length, self.width // self.heads, x.shape[1], x.stride(0))
        given = (*sizes, shape.lengths, q, x, self.kv.wide, self.q_bias, self.v_bias, *drop)
        queries, means, left = self.room(shape), self.room(shape), empty(shape.b * self.heads)
        probabilities = empty(shape.b * self.heads, kernels.whole(shape.length))
        kernels.call("attend_first", x.dtype, *given, context, context.stride(0), queries, means, probabilities, left)
        return given, down, queries, means, probabilities, left

    def backward(self, dcontext: Tensor, saved: tuple, shape: Shape, need_dx: bool) -> tuple[Tensor, Tensor | None]:
        """dcontext [B, D] -> gradients of q [B, D] and of x [B L, D]."""
        given, down, queries, means, probabilities, left = saved
        (b, heads, _, d, width, *_), q, x = given[:6], given[7], given[8]
        through, sums, dq = self.room(shape), self.room(shape), empty(*dcontext.shape, dtype=x.dtype)
        start = 0 if need_dx else self.width  # what adapters made of x is read in any case
        dx = empty(len(x), width - start, dtype=x.dtype) if start < width else None
        kernels.call("attend_first_backward", x.dtype, *given, queries, probabilities, left, dcontext,
                     dcontext.stride(0), through, sums, dq, start, dx, self.kv.dbias)  # fmt: skip
        factors = (q, self.q_bias, d**-0.5, sums), (dcontext, None, 1.0, means)  # of keys, of values
        for part, first, columns, factor, target in self.kv.targets():
            rows, shift, scale, right = factors[part]
            kernels.call("attend_first_gradient", x.dtype, b, heads, d, width, first, columns, rows, rows.stride(0),
                         shift, scale * factor, right, target)  # fmt: skip
        return dq, self.kv.down_backward(x, down, dx, need_dx)
