"""Dropout masks: drawn as bytes and compared with limits where they are needed."""

import math

import torch
from torch import Tensor

import kernels
from tape import empty

Dropout = tuple[Tensor | None, Tensor | None, float]  # random bytes, limits, 1 / (1 - p)
NOTHING: Dropout = (None, None, 1.0)  # is dropped


class Draw:
    """Dropout masks, 0 or 1, from torch's generator, or, with the kernels, from a counter that it seeds.

    One int64 draw makes eight decisions, where `bernoulli_` makes one. A byte alone would round p to 1/256,
    so each column's threshold is itself drawn between the two neighbours: every element is dropped with
    probability p (to 1/65536), and two elements of a column are correlated by less than 1e-4 (p = 0.1; 4e-4 at 0.01,
    3e-3 at 0.001). With several
    processes each draws the masks of the whole global batch and keeps its own rows, so that the result
    doesn't depend on their number (the batches must be padded to one length), but for one with a GPU: see `__call__`.
    """

    def __init__(
        self, training: bool, rows: int = 1, first: int = 0, whole: int | None = None, seeds: Tensor | None = None
    ) -> None:
        """For `rows` rows of a batch of `whole`, from the one at `first` on. seeds: keeps what is drawn, one a mask."""
        self.training, self.rows, self.first, self.whole = training, rows, first, whole or rows
        self.seeds, self.drawn = seeds, 0

    def __call__(self, shape: tuple[int, ...], p: float, like: Tensor, groups: int = 1) -> Tensor | None:
        """0/1 mask of `shape` in `like`'s dtype, whose first dimension (within each of `groups`) is the batch's.

        A GPU that has the batch to itself draws it at once: one kernel for seven.
        """
        if self.training and p > 0 and like.device.type == "cuda" and self.whole == self.rows:
            return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - p)
        bits, limit, _ = self.dropout(shape, p, like.device, groups)
        if bits is None:
            return None
        return torch.ge(bits, limit[: shape[-1]], out=torch.empty(shape, dtype=like.dtype, device=like.device))

    def dropout(self, shape: tuple[int, ...], p: float, device: torch.device, groups: int = 1) -> Dropout:
        """The same as random bytes of `shape` and limits [shape[-1] + 16]: what is below its column's limit is dropped.

        16 more than columns, since the kernels look at whole vectors.
        """
        if not self.training or p == 0:
            return NOTHING
        per_row, low = math.prod(shape) // (groups * self.rows), math.floor(p * 256)
        threshold, columns, n = round((p * 256 - low) * 65536) - 32768, shape[-1] + 16, groups * self.whole * per_row
        if device.type == "cpu" and kernels.library():
            bits, limit = empty(-(-n // 8) * 8 + 16, dtype=torch.int8), empty(columns, dtype=torch.int8)
            seed = self.seeds[self.drawn] if self.seeds is not None else torch.empty(1, dtype=torch.int64)
            self.drawn += 1
            kernels.call("draw", torch.float32, random_seeds(seed), len(bits), bits, columns, threshold, low - 128,
                         limit)  # fmt: skip
        else:
            coin = _bits(2 * columns, device).view(torch.int16)[:columns]
            limit, bits = (coin < threshold).to(torch.int8).add_(low - 128), _bits(n, device)
        if self.whole == self.rows:
            return bits[:n].view(shape), limit, 1 / (1 - p)
        mine = bits[:n].view(groups, self.whole, per_row)[:, self.first : self.first + self.rows]
        bits = torch.nn.functional.pad(mine.reshape(-1), (0, 16))  # the kernels look at whole vectors here too
        return bits[: mine.numel()].view(shape), limit, 1 / (1 - p)


def random_seeds(to: Tensor) -> Tensor:
    """From torch's generator; many at once are those that one after the other would be."""
    return to.random_(-(2**63), None)


def _bits(size: int, device: torch.device) -> Tensor:
    """At least `size` uniform bytes, as int8."""
    return torch.empty(-(-size // 8), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int8)
