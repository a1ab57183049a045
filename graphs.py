"""A step on a GPU as three launches: forward, backward and update, each captured once as a CUDA graph.

Launching some 400 kernels of 4 us one by one from Python takes far longer than they run: transformers' modules train
1,162 samples/s where graphs train 10,756 (H200, full, batch 16). Whatever a graph reads or writes lies where it did
when it was captured: the weights anyway, and the batch, which is copied there.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import Tensor

from dropout import Draw
from layers import Shape
from linear import Arena


class Pool:
    """The memory of all graphs of one model, of which one runs at a time, and the stream they are captured on."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.captures = device.type == "cuda"
        if not self.captures:
            return
        self.handle = torch.cuda.graph_pool_handle()
        self.stream, self.side = torch.cuda.Stream(device), torch.cuda.Stream(device)
        for stream in (self.stream, self.side):  # cuBLAS takes memory for each stream: now, not in a capture
            with torch.cuda.stream(stream):
                for kind in {torch.float32, dtype}:  # that of the head, that of the layers
                    some = torch.ones(64, 64, dtype=kind, device=device)
                    torch.addmm(some[0], some, some), torch.bmm(some[None], some[None])
        torch.cuda.synchronize()

    @contextmanager
    def beside(self, arena: Arena) -> Iterator[None]:
        """What `arena` puts aside runs beside the rest, and is done in the end. Small kernels leave most of a GPU free:
        the gradients of weights take no time but that of the gradients they follow from (backward, full, on an H200:
        0.86 to 0.58 ms, a kernel of attention's and a copy saved included)."""
        if not self.captures:
            yield
            return
        main, runs = torch.cuda.current_stream(), []

        def aside(run: Callable[[], None]) -> None:
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                run()
            runs.append(run)  # with the tensors it reads: their memory must not be given away before it has run

        before, arena.aside = arena.aside, aside
        try:
            yield
        finally:
            arena.aside = before
            main.wait_stream(self.side)
            runs.clear()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: a graph that it frees breaks the capture that is under way (PyTorch's #161037):
    the likely cause of one that broke in tests/on_gpu.py, where one model follows another."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Graph:
    """`run` captured; on the CPU, where there is nothing to capture, `run` itself."""

    def __init__(self, run: Callable[[], None], pool: Pool, alone: bool = False) -> None:
        """alone: what else runs may be in the middle of a pass, whose memory it leaves as it is."""
        if not pool.captures:
            self.replay = run
            return
        graph, handle = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle() if alone else pool.handle
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a capture cannot take what the first pass left there
        with torch.cuda.stream(pool.stream), _uncollected():
            graph.capture_begin(pool=handle, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # the capture is broken: what broke it is to be told
                    graph.capture_end()
                raise
            graph.capture_end()
        self.replay = graph.replay


class Pass:
    """Forward and backward for batches of one shape, kernel by kernel with the first, which makes ready what a capture
    needs, then as graphs. Both compute the same to the bit, dropout included: a resumed run begins with a first."""

    def __init__(self, fast, source: Tensor, draw: Draw, save: bool) -> None:
        """source: where batches are put, token ids [B, L] or hidden states [B, L, D]; fast: the FastClassifier."""
        (b, length), device = source.shape[:2], source.device
        self.fast, self.source, self.draw, self.save, self.calls = fast, source, draw, save, 0
        with torch.inference_mode(False):  # else only a pass in inference mode could write to it
            self.shape = Shape(b, length, torch.zeros(b, dtype=torch.int64, device=device), fast.dtype)
            self.logits = torch.zeros(b, fast.head.b2.shape[0], device=device)
            self.dy = torch.zeros_like(self.logits)

    def forward(self, source: Tensor, lengths: Tensor) -> Tensor:
        """-> logits [B, C]. Past its length the buffer holds tokens of an earlier batch, which `lengths` masks."""
        self.source[:, : source.shape[1]].copy_(source)
        self.shape.lengths.copy_(lengths)
        self.calls += 1
        if self.calls == 1:
            self._forward()
        else:
            if self.calls == 2:
                self.forwards = Graph(self._forward, self.fast.pool)
                self.backwards = Graph(self._backward, self.fast.pool) if self.save else None
            self.forwards.replay()
        return self.logits.clone()

    def backward(self, dy: Tensor) -> None:
        self.dy.copy_(dy)
        self._backward() if self.calls == 1 else self.backwards.replay()

    def _forward(self) -> None:
        shape = replace(self.shape)  # what it derives is of this batch
        logits, kept = self.fast.compute(self.source, shape, self.draw, self.save)
        self.kept = kept if self.save else None
        self.logits.copy_(logits)

    def _backward(self) -> None:
        kept, self.kept = self.kept, None
        with self.fast.pool.beside(self.fast.arena):
            self.fast.gradients(self.dy, kept)


class Passes:
    """The passes of a `FastClassifier` on a GPU. Batches are filled up to whole multiples of `STEP` tokens, so that
    few shapes do for all."""

    STEP, MOST = 8, 256  # MOST are kept, other shapes are computed kernel by kernel

    def __init__(self, fast, longest: int) -> None:
        self.fast, self.longest = fast, longest
        self.found: dict[tuple, Pass] = {}
        self.memory: dict[tuple[int, torch.dtype], Tensor] = {}  # of their batches, by its size
        self.pending: Callable[[], object | None] = lambda: None  # whose memory is in use

    def logits(self, source: Tensor, lengths: Tensor, draw: Draw) -> Tensor:
        """As `FastClassifier` gives them, differentiable."""
        save = torch.is_grad_enabled()
        length = min(-(-source.shape[1] // self.STEP) * self.STEP, self.longest)
        key = (len(source), length, source.ndim, draw.training, save, draw.first, draw.whole)
        free = self.pending() is None
        found = self.found.get(key) if free else None
        if found is None:
            kept = free and len(self.found) < self.MOST
            found = Pass(self.fast, self._place(source, length, kept), draw, save)
            if kept:
                self.found[key] = found
        if save:
            return _Passed.apply(self.fast.anchor, self, found, source, lengths)
        return found.forward(source, lengths)

    def _place(self, source: Tensor, length: int, kept: bool) -> Tensor:
        """[B, length, ...] for batches like `source`; those of passes that are kept share their memory."""
        shape = (len(source), length, *source.shape[2:])
        room = 1 << (math.prod(shape) - 1).bit_length()
        memory = self.memory.get((room, source.dtype)) if kept else None
        if memory is None:
            with torch.inference_mode(False):
                memory = torch.zeros(room, dtype=source.dtype, device=source.device)
            if kept:
                self.memory[room, source.dtype] = memory
        return memory[: math.prod(shape)].view(shape)


class _Token:
    """Lives as long as a backward may follow."""


class _Passed(torch.autograd.Function):
    """A pass as one autograd node: its backward writes the gradients where the optimiser reads them."""

    @staticmethod
    def forward(ctx, anchor: Tensor, passes: Passes, found: Pass, source: Tensor, lengths: Tensor) -> Tensor:
        ctx.found, ctx.token = found, _Token()
        if passes.pending() is None:
            passes.pending = weakref.ref(ctx.token)
        return found.forward(source, lengths)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        with ctx.found.fast.arena.adding():
            ctx.found.backward(dy)
        ctx.token = None
        return None, None, None, None, None
