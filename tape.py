"""The layers' kernels for one shape of batch, recorded once and then run again by a single call.

What a CUDA graph is to a GPU: between two kernels Python would look up tensors, cut memory and convert arguments, which
is a quarter of a step of 16 x 27 tokens. A recording holds addresses, so whatever is read or written lies where it did:
the weights anyway, and all that a pass makes in a `Workspace`.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

import kernels

CHUNK = 64 << 20  # bytes; what is not used of one is never touched, so it takes no memory
_space: ContextVar["Workspace | None"] = ContextVar("space", default=None)


class Workspace:
    """Memory that is handed out from the beginning again in every pass. It grows by chunks and never moves."""

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []
        self.rewind()

    def rewind(self) -> None:
        self.chunk, self.used = 0, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = -(-math.prod(shape) * dtype.itemsize // 64) * 64
        while self.chunk < len(self.chunks) and self.used + size > len(self.chunks[self.chunk]):
            self.chunk, self.used = self.chunk + 1, 0
        if self.chunk == len(self.chunks):
            self.chunks.append(torch.empty(max(size, CHUNK), dtype=torch.uint8))
        part = self.chunks[self.chunk][self.used : self.used + math.prod(shape) * dtype.itemsize]
        self.used += size
        return part.view(dtype).view(shape)


@contextmanager
def within(space: Workspace) -> Iterator[None]:
    """`empty` takes memory from the beginning of `space`."""
    space.rewind()
    token = _space.set(space)
    try:
        yield
    finally:
        _space.reset(token)


@contextmanager
def scratch() -> Iterator[None]:
    """What `empty` gives in here is free again behind it."""
    space = _space.get()
    mark = space and (space.chunk, space.used)
    yield
    if space:
        space.chunk, space.used = mark


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """As `torch.empty`, but from the workspace where one is given."""
    space = _space.get()
    return torch.empty(shape, dtype=dtype, device=device) if space is None else space.empty(shape, dtype)


class Tape:
    """Calls of kernels in the order they were made. Nothing else of what is done while recording is run again."""

    def __init__(self) -> None:
        self.count, self.slots = 0, bytearray()

    def add(self, unpack: int, form: str, values: list) -> None:
        """One call: who takes its arguments from the tape and how they are written there (see kernels.cpp)."""
        self.count += 1
        self.slots += struct.pack(form, unpack, len(values), *(value or 0 for value in values))

    @contextmanager
    def recording(self) -> Iterator[None]:
        outer, kernels.tape = kernels.tape, self
        try:
            yield
        finally:
            kernels.tape = outer
            self.recorded = torch.frombuffer(self.slots, dtype=torch.int64) if self.slots else None

    def replay(self) -> None:
        if self.recorded is not None:
            kernels.call("replay", torch.float32, self.count, self.recorded)
