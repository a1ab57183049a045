"""AdamW over a few flat buffers, with an embedding table that pays only for the rows a step touches.

Numerically `torch.optim.AdamW` (decoupled decay, bias corrections, no decay for 1-d parameters) after
`clip_grad_norm_`; the tests hold it to that at fp32 rounding level.
"""

import contextlib
import importlib.util
import math
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import kernels
import packaged
from graphs import Graph
from tape import Tape
from tiles import TiledMatrix

NODES = 5  # quadrature nodes: the skipped updates' sum to 2e-4 for a row last read at step 1, 1e-6 from step 20 on


def kernel_rule(step: int, group: dict, scale: Tensor | None) -> Tensor:
    """The numbers of one update as the kernels take them: struct AdamW in adamw.h."""
    beta1, beta2 = group["betas"]
    return torch.tensor((1.0 if scale is None else 1 / float(scale), group["lr"], 1 - beta1, beta2, 1 - beta2,
                         group["eps"], group["weight_decay"], 1 - beta1**step, math.sqrt(1 - beta2**step)))  # fmt: skip


def compiled_adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, rule: Tensor, copy: Tensor | TiledMatrix | None) -> None:
    """`adamw` by the kernel, which reads `g` in fp32 or bf16 and leaves the new `p` in `copy` (bf16) as well, or
    packed in the matrix that `p` is. rule: `kernel_rule`."""
    if isinstance(copy, TiledMatrix):
        kernels.call("adamw_packed", g.dtype, *copy.w.shape, p, g, m, v, copy.packed, copy.packed_back, rule)
    else:
        kernels.call("adamw", g.dtype, p.numel(), p, g, m, v, copy, rule)


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, group: dict, scale: Tensor | None) -> None:
    """One AdamW update of flat fp32 tensors in place; `g` is divided by `scale` first (clipping for free)."""
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        [p], [g], [m], [v], [], [torch.tensor(float(step))],
        lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
        eps=group["eps"], amsgrad=False, maximize=False, grad_scale=scale, found_inf=None,
    )  # fmt: skip


def square_sum(x: Tensor, compiled: bool) -> Tensor:
    """Of a flat tensor, as a scalar tensor."""
    return torch.tensor(kernels.call("square_sum", x.dtype, x.numel(), x)) if compiled else torch.dot(x, x)


def gauss_rule(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gauss quadrature of discrete measures: sum_j a_j f(b_j) ~ sum_i w_i f(x_i), f any smooth function.

    a, b: [R, J] float64, one measure a row, a >= 0 with a positive sum. Returns x, w: [R, NODES]. Lanczos
    builds each measure's Jacobi matrix; its eigenvalues are the nodes (Golub and Welsch, 1969).
    """
    mass = a.sum(1, keepdims=True)
    q, before = np.sqrt(a / mass), np.zeros_like(a)  # [R, J]
    jacobi = np.zeros((len(a), NODES, NODES))
    beta = np.zeros((len(a), 1))
    centre = b[:, :1]
    for i in range(NODES):
        u = (b - centre) * q - beta * before
        alpha = (u * q).sum(1, keepdims=True)
        u -= alpha * q
        jacobi[:, i, i] = (alpha + centre)[:, 0]
        beta = np.sqrt((u * u).sum(1, keepdims=True))
        alive = beta > 1e-9 * centre  # fewer distinct points than nodes: the rule is already exact
        beta = np.where(alive, beta, 0.0)
        before, q = q, np.where(alive, u / np.where(alive, beta, 1.0), 0.0)
        if i + 1 < NODES:
            jacobi[:, i, i + 1] = jacobi[:, i + 1, i] = beta[:, 0]
    x, vectors = np.linalg.eigh(jacobi)
    return np.where(x > 0, x, 1.0), np.where(x > 0, mass * vectors[:, 0] ** 2, 0.0)


class LazyTable:
    """AdamW for an embedding table [V, D] in RAM, row by row, only when a row is read.

    A dense step moves all V rows although a batch of 16 reads about 300 of 30,522. An untouched row has
    gradient 0, so what step s+j would have done to it is known: with r = sqrt(v) at its last update s,
        p <- (1 - lr wd) p - lr (b1^j m / bc1) / (b2^(j/2) r / sqrt(bc2) + eps).
    k such steps add up to  p <- C p - m sum_j a_j / (b_j r + eps)  with scalars a_j, b_j; terms vanish with
    b1^j. The sum over j is replaced by an n-node Gauss rule per row (exact to 1e-6 but for the first steps, see
    NODES), so catching up costs n terms instead of k steps: 3 ms of a step (one thread), where zeroing a dense
    gradient and a dense update of 11.7M entries read and write about 400 MB.
    """

    def __init__(self, weight: Tensor, group: dict, compiled: bool = False):
        self.weight, self.group, self.compiled = weight, group, compiled
        self.m, self.v = torch.zeros_like(weight), torch.zeros_like(weight)
        self.last = torch.zeros(len(weight), dtype=torch.int64)  # the step each row is up to date with
        self.step = 0
        self.lrs = np.zeros(1024)  # lrs[t - 1]: learning rate of step t
        self.logs = np.zeros(1024)  # logs[t]: log of prod_{i <= t} (1 - lr_i wd)

    def skipped(self, last: np.ndarray) -> tuple[np.ndarray, ...]:
        """For rows last updated at steps `last` [R]: C, b1^k, b2^k: [R, 1]; nodes x and weights w: [R, n]."""
        beta1, beta2 = self.group["betas"]
        k = self.step - last  # [R] skipped steps
        horizon = min(int(k.max()), math.ceil(math.log(1e-7) / math.log(max(beta1, 1e-9))))
        j = np.arange(1, horizon + 1)[None]  # [1, J]
        t = np.minimum(last[:, None] + j, self.step)  # [R, J]
        after = np.exp(self.logs[self.step] - self.logs[t])
        a = (j <= k[:, None]) * self.lrs[t - 1] * after * beta1**j / (1 - beta1**t)
        b = beta2 ** (j / 2) / np.sqrt(1 - beta2**t)
        x, w = gauss_rule(np.maximum(a, 1e-300), b)
        decay = np.exp(self.logs[self.step] - self.logs[last])
        return decay[:, None], beta1 ** k[:, None], beta2 ** k[:, None], x, w

    @torch.no_grad()
    def catch_up(self, rows: Tensor) -> None:
        """Bring `rows` (unique ids, [U]) up to date with all steps taken so far."""
        last = self.last[rows]
        stale = last < self.step
        if not stale.any():
            return
        rows = rows[stale]
        distinct, index = np.unique(last[stale].numpy(), return_inverse=True)
        table = np.concatenate(self.skipped(distinct), 1).astype(np.float32)  # [distinct, 3 + 2n]
        if self.compiled:
            kernels.call("adamw_skipped", torch.float32, len(rows), self.weight.shape[1], rows, torch.from_numpy(index),
                         NODES, torch.from_numpy(table), self.group["eps"], self.weight, self.m, self.v)  # fmt: skip
            self.last[rows] = self.step
            return
        decay, decay_m, decay_v, *rule = torch.from_numpy(table[index]).split(1, 1)
        m, v = self.m[rows], self.v[rows]  # [U, D]
        root, total = v.sqrt(), torch.zeros_like(m)
        for x, w in zip(rule[:NODES], rule[NODES:]):
            total += w / torch.addcmul(root.new_tensor(self.group["eps"]), root, x)
        self.weight.data[rows] = torch.addcmul(self.weight.data[rows] * decay, m, total, value=-1)
        self.m[rows], self.v[rows] = m * decay_m, v * decay_v
        self.last[rows] = self.step

    @torch.no_grad()
    def apply(self, rows: Tensor, grad: Tensor, scale: Tensor | None) -> None:
        """Take one AdamW step: `rows` [U] get `grad` [U, D], every other row its zero gradient, later."""
        self.catch_up(rows)
        if self.step + 1 >= len(self.logs):
            self.lrs, self.logs = np.pad(self.lrs, (0, len(self.lrs))), np.pad(self.logs, (0, len(self.logs)))
        self.lrs[self.step] = self.group["lr"]
        self.logs[self.step + 1] = self.logs[self.step] + math.log1p(-self.group["lr"] * self.group["weight_decay"])
        self.step += 1
        if self.compiled:
            kernels.call("adamw_rows", torch.float32, *grad.shape, rows, self.weight, grad, self.m, self.v,
                         kernel_rule(self.step, self.group, scale))  # fmt: skip
        else:
            p, m, v = self.weight.data[rows], self.m[rows], self.v[rows]
            adamw(p, grad, m, v, self.step, self.group, scale)
            self.weight.data[rows], self.m[rows], self.v[rows] = p, m, v
        self.last[rows] = self.step

    def flush(self) -> None:
        """Bring every row up to date, in pieces that bound the memory. Needed before weights are read elsewhere."""
        for rows in torch.arange(len(self.weight)).split(4096):
            self.catch_up(rows)

    def state_dict(self) -> dict:
        return {"m": self.m, "v": self.v, "last": self.last, "step": self.step,
                "lrs": torch.from_numpy(self.lrs[: self.step].copy())}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.m.copy_(state["m"]), self.v.copy_(state["v"]), self.last.copy_(state["last"])
        self.step = state["step"]
        size = max(1024, 2 * self.step + 2)
        self.lrs, self.logs = np.zeros(size), np.zeros(size)
        self.lrs[: self.step] = state["lrs"].numpy()
        for t in range(self.step):  # the same additions in the same order as the uninterrupted run
            self.logs[t + 1] = self.logs[t] + math.log1p(-self.lrs[t] * self.group["weight_decay"])


class FastAdamW(torch.optim.Optimizer):
    """AdamW for a `FastClassifier`; `param_groups` hold (decayed, undecayed) parameters, so schedulers work.

    `step` returns the gradient's global norm before clipping. Call `zero_grad` of this object only: the next
    backward then overwrites the flat gradient instead of adding to it, so nothing is filled with zeros.
    Call `flush` before evaluating or saving the model; a checkpoint of model + `state_dict()` needs no flush
    and resumes bit for bit.
    """

    def __init__(self, fast, lr: float, weight_decay: float = 0.01, max_grad_norm: float | None = 1.0) -> None:
        self.fast, self.arena, self.max_grad_norm = fast, fast.arena, max_grad_norm
        decayed, plain = self.arena.decayed, self.arena.plain
        table = [fast.table] if fast.table.requires_grad and not self.arena.holds(fast.table) else []
        groups = [{"params": decayed + table, "weight_decay": weight_decay},
                  {"params": plain, "weight_decay": 0.0}]  # fmt: skip
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8})
        self.m, self.v = torch.zeros_like(self.arena.grad), torch.zeros_like(self.arena.grad)
        self.steps, self.compiled = 0, fast.compiled
        self.rules = torch.zeros(2, 9)  # of the decayed parameters and the others, where recordings find them
        self.pieces, self.tapes = {}, {}  # by whether all of the gradient is in fp32
        self.lazy = LazyTable(fast.table, self.param_groups[0], self.compiled) if table else None
        fast.attach(self.lazy)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.arena.reset_grad()
        self.fast.table_grads.clear()

    def all_reduce(self) -> None:
        """Sum the gradients over all processes: one flat all-reduce, and the table's rows gathered."""
        self.arena.widen()
        dist.all_reduce(self.arena.grad)
        if self.lazy:
            everyone: list = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self.fast.table_grads)
            self.fast.table_grads[:] = [self._added([pair for part in everyone for pair in part])]

    def _table_grad(self) -> tuple[Tensor, Tensor]:
        """Row gradients of all micro-batches and processes, summed: unique ids [U], gradient [U, D]."""
        parts = self.fast.table_grads
        return parts[0] if len(parts) == 1 else self._added(parts)

    @staticmethod
    def _added(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        rows, index = torch.unique(torch.cat([r for r, _ in parts]), return_inverse=True)
        grads = torch.cat([g for _, g in parts])
        return rows, grads.new_zeros(len(rows), grads.shape[1]).index_add_(0, index, grads)

    @torch.no_grad()
    def step(self, closure=None) -> Tensor:
        if not self.compiled:
            self.arena.widen()
        summed = not self.arena.widened
        if summed not in self.pieces:
            self.pieces[summed] = list(self.arena.pieces())
        pieces = self.pieces[summed]
        square = sum(square_sum(part, self.compiled) for _, part, matrix in pieces if matrix is None or not summed)
        if summed:
            square = square + self.arena.squares.sum().float()
        if self.lazy:
            rows, grad = self._table_grad()
            square = square + square_sum(grad.view(-1), self.compiled)
        norm = square.sqrt()
        if not math.isfinite(norm):  # one bad batch must not spoil the weights; the caller decides what follows
            return norm
        scale = self._scale(norm)
        self.steps += 1
        if self.compiled:
            self._compiled_update(pieces, scale, summed)
        else:
            for at, part, _ in pieces:
                group = self.param_groups[0 if at.stop <= self.arena.decayed_size else -1]
                adamw(self.arena.flat[at], part, self.m[at], self.v[at], self.steps, group, scale)
            self.arena.sync()
        if self.lazy:
            self.lazy.apply(rows, grad, scale)
        return norm

    def _scale(self, norm: Tensor) -> Tensor | None:
        """What AdamW divides the gradient by as it reads it, so that clipping costs no pass; None without clipping."""
        return None if self.max_grad_norm is None else ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)

    def _compiled_update(self, pieces: list, scale: Tensor | None, key: bool) -> None:
        """AdamW on all pieces, and whatever follows the weights; recorded where that is done by kernels alone."""
        for rule, group in zip(self.rules, (self.param_groups[0], self.param_groups[-1])):
            rule.copy_(kernel_rule(self.steps, group, scale))
        if key in self.tapes:
            return self.tapes[key].replay()
        tape = Tape()
        with tape.recording() if self.fast.recordable else contextlib.nullcontext():
            for at, part, matrix in pieces:
                rule, copy = self.rules[int(at.stop > self.arena.decayed_size)], matrix
                if matrix is None and self.arena.compute is not self.arena.flat:
                    copy = self.arena.compute[at]
                compiled_adamw(self.arena.flat[at], part, self.m[at], self.v[at], rule, copy)
            self.arena.sync(copied=True)
        if self.fast.recordable:
            self.tapes[key] = tape

    def flush(self) -> None:
        """Make the module's weights current (the embedding table's rows lag behind during training)."""
        if self.lazy:
            self.lazy.flush()

    def state_dict(self) -> dict:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups]
        return {"m": self.m, "v": self.v, "steps": self.steps, "groups": groups,
                "lazy": self.lazy.state_dict() if self.lazy else None}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.m.copy_(state["m"]), self.v.copy_(state["v"])
        self.steps = state["steps"]
        for group, saved in zip(self.param_groups, state["groups"], strict=True):
            group.update(saved)
        if self.lazy:
            self.lazy.load_state_dict(state["lazy"])


class GraphedAdamW(FastAdamW):
    """`FastAdamW` for a GPU: one launch, captured as a CUDA graph. What changes from step to step (the rates, how many
    steps there were, whether the gradient is finite) is read from the GPU's memory, where it stays.

    With Triton and a C compiler each number is read and written once (gpu.py), else by PyTorch's fused AdamW.
    """

    def __init__(self, fast, **settings: Any) -> None:
        super().__init__(fast, **settings)
        self.norm, self.count, *self.rates = torch.zeros(2 + len(self.param_groups), device=self.arena.flat.device)
        self.kernel = None
        if self.norm.device.type == "cuda" and importlib.util.find_spec("triton"):
            with contextlib.suppress(Exception):  # of many kinds, where there is no C compiler
                os.environ.setdefault("TRITON_CACHE_DIR", str(packaged.cache_dir() / "triton"))
                from gpu import OnePassAdamW  # here, since Triton takes a while to import and is not everywhere

                self.kernel = OnePassAdamW(self.param_groups[0]["betas"], self.norm.device, fast.dtype)
        self.graphs: dict[bool, Graph] = {}  # by whether all of the gradient is in fp32

    @torch.no_grad()
    def step(self, closure=None) -> Tensor:
        """On the device: whoever looks at it waits."""
        if not self.kernel:
            self.arena.widen()
        for rate, group in zip(self.rates, self.param_groups):
            rate.fill_(group["lr"])
        if graph := self.graphs.get(self.arena.widened):
            graph.replay()
        else:
            self._update()
            self.graphs[self.arena.widened] = Graph(self._update, self.fast.pool, alone=True)
        self.arena.note_versions()
        return self.norm

    def _update(self) -> None:
        arena, parts = self.arena, self.arena.parts()
        norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for _, part in parts]
        self.norm.copy_(torch.linalg.vector_norm(torch.stack(norms)))
        finite, scale = self.norm.isfinite().float(), self._scale(self.norm)
        self.count += finite
        for at, part in parts:
            number = 0 if at.stop <= arena.decayed_size else -1
            group, rate = self.param_groups[number], self.rates[number]
            state = (arena.flat[at], part, self.m[at], self.v[at])
            if self.kernel:
                unread = len(arena.matrix_grads) <= at.start < arena.decayed_size  # embeddings and head, but in fp32
                copy = None if unread or arena.compute is arena.flat else arena.compute[at]
                self.kernel.update(*state, copy, self.count, rate, group["weight_decay"], group["eps"], scale, finite)
                continue
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                *([x] for x in state), [], [self.count], lr=rate, beta1=beta1, beta2=beta2, eps=group["eps"],
                weight_decay=group["weight_decay"], amsgrad=False, maximize=False, grad_scale=scale,
                found_inf=1 - finite,
            )  # fmt: skip
        arena.sync(copied=self.kernel is not None)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "steps": int(self.count)}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.count.fill_(self.steps)


def adamw_for(fast, **settings: Any) -> FastAdamW:
    """The optimiser of a `FastClassifier`."""
    return (GraphedAdamW if fast.graphed else FastAdamW)(fast, **settings)
