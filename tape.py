"""The layers' kernels for one shape of batch, recorded once and then run again by a single call.

What a CUDA graph is to a GPU: between two kernels Python would look up tensors, cut memory and convert arguments, which
is a quarter of a step of 16 x 27 tokens. A recording holds addresses, so whatever is read or written lies where it did:
the weights anyway, and all that a pass makes in a `Workspace`.
"""

import math
import struct
import weakref
from bisect import insort
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

import kernels

CHUNK = 64 << 20  # bytes; what is not used of one is never touched, so it takes no memory
_space: ContextVar["Workspace | None"] = ContextVar("space", default=None)


class Workspace:
    """Memory that is given out again as soon as no tensor lies on it: what a pass makes takes as little as it can, and
    takes it at the same addresses in the next pass. It grows by chunks and never moves.

    Workspaces of the same `chunks` share their memory: only one of them is in use at a time.
    """

    def __init__(self, chunks: list[Tensor] | None = None) -> None:
        self.chunks: list[Tensor] = [] if chunks is None else chunks
        self.taken: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # by chunk: [start, stop), in order

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        room = max(-(-size // 64) * 64, 64)
        chunk, start = self._first_fit(room)
        taken, place = self.taken[chunk], (start, start + room)
        insort(taken, place)
        memory = memoryview(self.chunks[chunk].numpy())[start : start + room]
        weakref.finalize(memory, taken.remove, place).atexit = False  # whatever lies on it keeps `memory` alive
        return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(shape)

    def _first_fit(self, size: int) -> tuple[int, int]:
        """Chunk and place of the first gap for `size` bytes."""
        for number, chunk in enumerate(self.chunks):
            start = 0
            for begin, end in (*self.taken[number], (len(chunk), 0)):
                if begin - start >= size:
                    return number, start
                start = end
        self.chunks.append(torch.empty(max(size, CHUNK), dtype=torch.uint8))
        return len(self.chunks) - 1, 0


@contextmanager
def within(space: Workspace | None) -> Iterator[None]:
    """`empty` takes memory from `space`, if there is one."""
    token = _space.set(space)
    try:
        yield
    finally:
        _space.reset(token)


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """As `torch.empty`, but on the CPU from the workspace, where one is given."""
    space = _space.get()
    if space is None or (device is not None and device.type != "cpu"):
        return torch.empty(shape, dtype=dtype, device=device)
    return space.empty(shape, dtype)


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
