"""Products with weights: PyTorch's, our own in fp32 (floats.h), or on packed tiles in bf16 (products.h).

Shapes: N rows, `in` and `out` the widths of a linear layer.
"""

import torch
from torch import Tensor

import kernels
from tape import empty


def unit(t: Tensor) -> int:
    """What the width of t must be a multiple of for our own products to take it."""
    return kernels.panel() if t.device.type == "cpu" and t.dtype == torch.float32 else 32


def _fit(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether our own products could take these."""
    return all(
        t.dtype == dtype and t.device.type == "cpu" and t.shape[-1] % unit(t) == 0 and t.stride(-1) == 1
        for t in tensors
    )


def tiled(*tensors: Tensor) -> bool:
    """Whether products of these run on tiles, in bf16."""
    return _fit(torch.bfloat16, *tensors) and kernels.tiles()


def own_floats(*tensors: Tensor) -> bool:
    """Whether products of these are our own in fp32."""
    return _fit(torch.float32, *tensors) and kernels.library() is not None


class Matrix:
    """w [out, in] for products with PyTorch."""

    recordable = False  # whether products are kernels alone (see tape.py)

    def __init__(self, w: Tensor):
        self.w = w

    def pack(self, first: int = 0) -> None:
        """To be called after the columns of w from `first` on have changed."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x w^T + bias: [N, in] -> [N, out]."""
        return x @ self.w.t() if bias is None else torch.addmm(bias, x, self.w.t())

    def backward(self, dy: Tensor, first: int = 0) -> Tensor:
        """dy w: [N, out] -> [N, in], from column `first` on (a multiple of `unit`)."""
        return dy @ self.w[:, first:]


class FloatMatrix(Matrix):
    """The same in fp32 with our own products, which can be recorded: a step of 16 x 27 tokens takes 191 instead of 218
    ms (Zen 3), with LoRA r16 160 instead of 199, of the last two layers 33 instead of 44, of the last one 6.3 instead
    of 8.9."""

    recordable = True

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        (out, width), y = self.w.shape, empty(len(x), len(self.w))
        kernels.call("multiply_forward", x.dtype, len(x), out, width, x, x.stride(0), self.w, self.w.stride(0), y)
        return y if bias is None else y.add_(bias)

    def backward(self, dy: Tensor, first: int = 0) -> Tensor:
        w = self.w[:, first:]
        (out, width), dx = w.shape, empty(len(dy), w.shape[1])
        kernels.call("multiply_backward", dy.dtype, len(dy), width, out, dy, dy.stride(0), w, w.stride(0), dx)
        return dx


class TiledMatrix(Matrix):
    """The same on tiles; w itself is read by `pack` alone, and AdamW does without. With AMX a step of 16 x 27 tokens
    spends 21 ms in products, 34 with the library's; with AVX512-BF16 both take as long, but these can be recorded."""

    recordable = True

    def __init__(self, w: Tensor):
        super().__init__(w)
        self.packed, self.packed_back = torch.empty_like(w), torch.empty_like(w)
        self.pack()

    def pack(self, first: int = 0) -> None:
        kernels.call("pack_weight", self.w.dtype, *self.w.shape, first, self.w, self.packed, self.packed_back)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self._multiply(x, self.w.shape[0], self.packed)
        return y if bias is None else y.add_(bias)

    def backward(self, dy: Tensor, first: int = 0) -> Tensor:
        out, width = self.w.shape
        return self._multiply(dy, width - first, self.packed_back.view(-1)[first * out :])

    @staticmethod
    def _multiply(x: Tensor, columns: int, packed: Tensor) -> Tensor:
        y = empty(len(x), columns, dtype=x.dtype)
        kernels.call("multiply", x.dtype, len(x), columns, x.shape[1], x, x.stride(0), packed, y, columns)
        return y


def packs(w: Tensor) -> bool:
    """Whether w can be a `TiledMatrix`."""
    return len(w) % 32 == 0 and tiled(w)


def matrix(w: Tensor) -> Matrix:
    if packs(w):
        return TiledMatrix(w)
    return FloatMatrix(w) if own_floats(w) and len(w) % unit(w) == 0 else Matrix(w)


def gradient(dy: Tensor, x: Tensor, out: Tensor | None = None, square: Tensor | None = None) -> Tensor:
    """dy^T x: [N, out] and [N, in] -> [out, in]; the sum of its squares goes to `square`, float64."""
    if tiled(dy, x):
        out = empty(dy.shape[1], x.shape[1], dtype=dy.dtype) if out is None else out
        kernels.call("gradient", dy.dtype, *dy.shape, x.shape[1], dy, dy.stride(0), x, x.stride(0), out, square)
        return out
    if own_floats(dy, x):
        out = empty(dy.shape[1], x.shape[1]) if out is None else out
        kernels.call("gradient_floats", dy.dtype, *dy.shape, x.shape[1], dy, dy.stride(0), x, x.stride(0), out)
    else:
        out = torch.mm(dy.t(), x, out=out)
    if square is not None:
        square.copy_(out.double().square().sum())
    return out
