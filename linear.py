"""Linear layers of the fast path, plain and with LoRA adapters, over parameters in one flat buffer.

Shapes: N tokens, D width, r rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import pairwise
from operator import attrgetter

import torch
from torch import Tensor, nn

from dropout import Draw
from tape import empty
from tiles import TiledMatrix, gradient, matrix, unit

aten = torch.ops.aten


def put(target: Tensor | None, value: Tensor) -> None:
    """Copy `value` to a gradient's place; `target` is None if nobody wants that gradient."""
    if target is not None:
        target.copy_(value)


def base_layer(module: nn.Module) -> nn.Linear:
    return getattr(module, "base_layer", module)


class Arena:
    """Parameters in one flat fp32 buffer, [matrices | decayed | plain | gap | frozen], flat gradient and bf16 copy.

    The module's parameters become views, so saving and loading see nothing new. One buffer each means one
    AdamW, one gradient norm, one all-reduce and one cast to bf16 a step, and q, k, v as one product.

    The gradients of `matrices` are products in bf16. As long as there is one backward a step they stay so, in
    `matrix_grads`: the optimiser reads them there, and no pass widens them (6 ms of a step). `widen` does, for a sum.
    A backward writes every gradient anew, inside `adding`, which adds up.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], dtype: torch.dtype):
        params = matrices + others
        self.matrices = [p for p in matrices if p.requires_grad]
        self.decayed = self.matrices + [p for p in others if p.requires_grad and p.ndim >= 2]
        self.plain = [p for p in others if p.requires_grad and p.ndim < 2]
        frozen = [p for p in params if not p.requires_grad]
        self.params = self.decayed + self.plain + frozen
        self.decayed_size = sum(p.numel() for p in self.decayed)
        self.trained = self.decayed_size + sum(p.numel() for p in self.plain)
        gap = -self.trained % 64  # a GPU's products want matrices that begin at whole vectors
        flat = [p.detach().reshape(-1) for p in self.params]
        flat.insert(len(self.decayed + self.plain), flat[0].new_zeros(gap))
        self.flat = torch.cat(flat)
        self.grad = torch.zeros_like(self.flat[: self.trained])
        self.compute = self.flat if dtype == torch.float32 else self.flat.to(dtype)
        wide = self.grad[: sum(p.numel() for p in self.matrices)]
        self.matrix_grads = wide if dtype == torch.float32 else torch.zeros_like(wide, dtype=dtype)
        self.offsets, start = {}, 0
        for p in self.params:
            if frozen and p is frozen[0]:
                start += gap
            self.offsets[id(p)] = start
            p.data = self.view(self.flat, [p])
            start += p.numel()
        self.grads = [(p, self.view(self.grad, [p])) for p in self.decayed + self.plain]
        self.squares = torch.zeros(len(self.matrices), dtype=torch.float64)  # of their gradients; the products sum them
        self.packed: dict[int, TiledMatrix] = {}  # trained ones by their place in `flat`; who changes them packs them
        self.listeners: list = []  # called after a step changed `compute`
        self.reloads: list = []  # called after anything may have changed it
        self.aside: Callable[[Callable[[], None]], None] = lambda run: run()  # for what no gradient waits for
        self.versions = self._versions()
        self.reset_grad()

    def view(self, buffer: Tensor, params: list[nn.Parameter]) -> Tensor:
        """`params`, neighbours of one shape, as one view of `buffer`, stacked along their first dimension."""
        start, size = self.offsets[id(params[0])], params[0].numel()
        if [self.offsets[id(p)] for p in params] != [start + i * size for i in range(len(params))]:
            raise ValueError("these parameters are not neighbours")
        return buffer[start : start + size * len(params)].view(-1, *params[0].shape[1:])

    def holds(self, p: nn.Parameter) -> bool:
        return id(p) in self.offsets

    def grad_view(self, params: list[nn.Parameter]) -> Tensor | None:
        return self.view(self.grad, params) if params[0].requires_grad else None

    def matrix_grad(self, params: list[nn.Parameter]) -> Tensor | None:
        return self.view(self.matrix_grads, params) if params[0].requires_grad else None

    def reset_grad(self) -> None:
        """Forget the gradient: no pass fills it with zeros."""
        self.fresh, self.widened = True, self.matrix_grads.dtype == self.grad.dtype
        for p, view in self.grads:
            p.grad = view

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Around a backward: adds the gradient from before, if there is one."""
        if self.fresh:
            yield
        else:
            self.widen()
            before, self.widened = self.grad.clone(), self.matrix_grads.dtype == self.grad.dtype
            yield
            self.widen()
            self.grad += before
        self.fresh = False

    def widen(self) -> None:
        """Make `grad` hold all of the gradient."""
        if not self.widened:
            self.grad[: len(self.matrix_grads)].copy_(self.matrix_grads)
            self.widened = True

    def parts(self) -> list[tuple[slice, Tensor]]:
        """The trained parameters' gradient where it is now: (their place in `flat`, gradient), decayed ones first."""
        cuts = [0, *([] if self.widened else [len(self.matrix_grads)]), self.decayed_size, self.trained]
        places = [slice(start, end) for start, end in pairwise(cuts) if start < end]
        return [(at, self.matrix_grads if at.start == 0 and not self.widened else self.grad[at]) for at in places]

    def pieces(self) -> Iterator[tuple[slice, Tensor, TiledMatrix | None]]:
        """`parts`, cut where packed matrices begin and end: (place, gradient, the matrix at it)."""
        for at, part in self.parts():
            start = at.start
            while start < at.stop:
                if matrix := self.packed.get(start):
                    stop = start + matrix.w.numel()
                else:
                    stop = min((first for first in self.packed if start < first < at.stop), default=at.stop)
                yield slice(start, stop), part[start - at.start : stop - at.start], matrix
                start = stop

    def pack(self) -> None:
        for packed in self.packed.values():
            packed.pack()

    def square(self, place: int) -> Tensor | None:
        """Where the sum of the squares of the product at `place` goes: optim.py reads those of packed matrices."""
        return self.squares[list(self.packed).index(place)] if place in self.packed else None

    def _versions(self) -> int:
        return sum(map(attrgetter("_version"), self.params))

    def sync(self, copied: bool = False) -> None:
        """Refresh the bf16 copy once a step, where autocast casts at every use. copied: the optimiser did it."""
        if self.compute is not self.flat and not copied:
            self.compute[: self.trained].copy_(self.flat[: self.trained])
            self.pack()
        for listener in self.listeners:
            listener()
        self.note_versions()

    def note_versions(self) -> None:
        """The parameters are what `compute` was made of."""
        self.versions = self._versions()

    def sync_if_changed(self) -> None:
        """After somebody else wrote to the parameters (load_state_dict, another optimiser)."""
        if self.versions != self._versions():
            self.compute.copy_(self.flat)
            self.pack()
            for listener in self.reloads:
                listener()
            self.sync(copied=True)


class Linear:
    """One or more nn.Linear modules reading the same input, as one product."""

    joint = False  # whether its input is longer than x, which is then written into it (see LoraLinear)

    def __init__(self, arena: Arena, modules: list[nn.Module]):
        weights, biases = [base_layer(m).weight for m in modules], [base_layer(m).bias for m in modules]
        self.arena = arena
        self.weight, self.bias = arena.view(arena.compute, weights), arena.view(arena.compute, biases)
        self.wide_bias = arena.view(arena.flat, biases)
        self.dweight, self.dbias = arena.matrix_grad(weights), arena.grad_view(biases)
        self.prepare()

    def prepare(self) -> None:
        """Make the matrix of the products, and have it follow the weights."""
        self.matrix = matrix(self.weight)
        if self.dweight is None:
            self.arena.reloads.append(self.matrix.pack)
        elif isinstance(self.matrix, TiledMatrix):
            self.arena.packed[self.weight.storage_offset()] = self.matrix

    @property
    def recordable(self) -> bool:
        """Whether forward and backward are kernels alone (see tape.py)."""
        return self.matrix.recordable

    def buffer(self, n: int) -> tuple[Tensor, Tensor]:
        """What `forward` takes, and the part of it [n, in] the caller fills."""
        x = empty(n, self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        return x, x

    def forward(self, x: Tensor, draw: Draw, bias: bool = True) -> tuple[Tensor, tuple]:
        """[N, out]. The kernels add the bias themselves: inside the product it costs 75 to 400 us."""
        return self.matrix.forward(x, self.bias if bias else None), (x,)

    def backward(self, dy: Tensor, saved: tuple, need_dx: bool = True, need_bias: bool = True) -> Tensor | None:
        if self.dweight is not None:
            self.arena.aside(partial(self.put_gradients, dy, saved[0], need_bias))
        return self.matrix.backward(dy) if need_dx else None  # [N, in]

    def put_gradients(self, dy: Tensor, x: Tensor, bias: bool) -> None:
        gradient(dy, x, self.dweight, self.arena.square(self.dweight.storage_offset()))
        if bias:
            torch.sum(dy, 0, dtype=self.dbias.dtype, out=self.dbias)


class LoraLinear(Linear):
    """The same with G of the modules adapted: y = x W' + b + scaling * B A (keep * x) / (1 - p), base frozen.

    The input is extended to [x | h] and the weight to [W | scaling B]: one product does the base layer and all
    G up-projections.
    """

    def __init__(self, arena: Arena, modules: list[nn.Module]):
        super().__init__(arena, modules)
        self.read_adapters(modules)
        rank, (out, width) = len(self.parts) * self.r, self.weight.shape
        self.width, padding = width, -rank % unit(self.weight)
        self.joint = width <= out  # else the copy into the longer input costs more than a second product
        self.wide = self.weight.new_zeros(out, width + rank + padding)
        self.matrix = matrix(self.wide)
        arena.reloads.append(self.reload)
        arena.listeners.append(self.refresh)
        self.reload()

    def read_adapters(self, modules: list[nn.Module]) -> None:
        arena = self.arena
        name = next(m for m in modules if hasattr(m, "lora_A")).active_adapters[0]
        self.parts = [i for i, m in enumerate(modules) if hasattr(m, "lora_A")]
        adapted = [modules[i] for i in self.parts]
        down, up = [m.lora_A[name].weight for m in adapted], [m.lora_B[name].weight for m in adapted]
        self.r, self.p = down[0].shape[0], getattr(adapted[0].lora_dropout[name], "p", 0.0)
        self.scaling = [m.scaling[name] for m in adapted]
        self.down = arena.view(arena.compute, down).view(len(down), self.r, -1)  # [G, r, in]
        self.wide_down = arena.view(arena.flat, down).view_as(self.down)  # the same in fp32
        self.ddown, self.dup = arena.matrix_grad(down), [arena.matrix_grad([p]) for p in up]
        self.dups = arena.matrix_grad(up)  # [G out / n, r], the same as one
        self.up = [arena.view(arena.compute, [p]) for p in up]  # G x [out / n, r]
        self.ups = arena.view(arena.compute, up)  # [G out / n, r], the same as one

    def prepare(self) -> None:
        """Nothing: the matrix is made of `wide`."""

    def slots(self):
        """(part, its rows of the output, its columns of the block)."""
        out = self.up[0].shape[0]
        for g, i in enumerate(self.parts):
            yield g, slice(i * out, (i + 1) * out), slice(g * self.r, (g + 1) * self.r)

    @cached_property
    def block(self) -> Tensor:
        """scaling * B of each part, block by block: [out, G r]."""
        return self.weight.new_zeros(len(self.weight), len(self.parts) * self.r)

    def reload(self) -> None:
        self.wide[:, : self.width] = self.weight
        self.matrix.pack()
        self.refresh()

    def refresh(self) -> None:
        for g, rows, columns in self.slots():
            torch.mul(self.up[g], self.scaling[g], out=self.block[rows, columns])
        self.wide[:, self.width : self.width + self.block.shape[1]] = self.block
        self.matrix.pack(self.width)

    def buffer(self, n: int) -> tuple[Tensor, Tensor]:
        if not self.joint:
            return super().buffer(n)
        wide = self.wide.new_empty(n, self.wide.shape[1])
        wide[:, self.width + self.block.shape[1] :] = 0
        return wide, wide[:, : self.width]

    def forward(self, wide: Tensor, draw: Draw, bias: bool = True) -> tuple[Tensor, tuple]:
        x, groups = wide[:, : self.width], len(self.parts)
        keep = draw((groups, *x.shape), self.p, x, groups)
        xd = x.expand(groups, *x.shape) if keep is None else x * keep  # [G, N, in]
        h = torch.bmm(xd, self.down.transpose(1, 2)).transpose(0, 1)  # [N, G, r]
        h = torch.mul(h, 1.0 if keep is None else 1 / (1 - self.p)).reshape(len(x), -1)
        if not self.joint:
            y = (x @ self.weight.t()).addmm_(h, self.block.t())
        else:
            wide[:, self.width : self.width + h.shape[1]] = h
            y = self.matrix.forward(wide)
        return y.add_(self.bias) if bias else y, (h, xd, keep)

    def put_up(self, h: Tensor, dy: Tensor) -> None:
        """The gradients of the matrices B. h: [N, G r] and columns of no account, dy: [N, out]."""
        dup = gradient(h, dy)  # [G r, out], of which the blocks count
        for g, rows, columns in self.slots():
            torch.mul(dup[columns, rows].t(), self.scaling[g], out=self.dup[g])

    def backward(self, dy: Tensor, saved: tuple, need_dx: bool = True, need_bias: bool = True) -> Tensor | None:
        h, xd, keep = saved
        self.put_up(h, dy)
        dh = (dy @ self.block).view(len(dy), -1, self.r).transpose(0, 1)  # [G, N, r]
        dh = dh.contiguous() if keep is None else dh * (1 / (1 - self.p))
        torch.bmm(dh.transpose(1, 2), xd, out=self.ddown.view_as(self.down))
        if not need_dx:
            return None
        dxd = torch.bmm(dh, self.down)  # [G, N, in]
        if keep is not None:
            dxd.mul_(keep)
        dx = dxd[0]
        for other in dxd[1:]:
            dx.add_(other)
        return dx.addmm_(dy, self.weight)


class DeviceLoraLinear(LoraLinear):
    """As `LoraLinear`, all modules adapted alike, for a GPU, where a launch costs more than what a small product
    computes: no longer input, no copy of the weights that has to follow them, and the adapters' products as one."""

    def __init__(self, arena: Arena, modules: list[nn.Module]):
        Linear.__init__(self, arena, modules)
        self.read_adapters(modules)
        self.alpha = self.scaling[0]
        self.ups = self.ups.view(len(modules), -1, self.r)  # [G, out / G, r]

    def forward(self, x: Tensor, draw: Draw, bias: bool = True) -> tuple[Tensor, tuple]:
        y = torch.addmm(self.bias, x, self.weight.t()) if bias else x @ self.weight.t()
        keep, xd = None, x.expand(len(self.parts), *x.shape)  # [G, N, in]
        if draw.training and self.p > 0:
            xd, keep = torch.native_dropout(xd, self.p, True)
        h = torch.bmm(xd, self.down.transpose(1, 2))  # [G, N, r]
        self.by_part(y).baddbmm_(h, self.ups.transpose(1, 2), alpha=self.alpha)
        return y, (h, xd, keep)

    def by_part(self, y: Tensor) -> Tensor:
        """[N, out] -> [G, N, out / G]."""
        return y.view(len(y), len(self.parts), -1).transpose(0, 1)

    def backward(self, dy: Tensor, saved: tuple, need_dx: bool = True, need_bias: bool = True) -> Tensor | None:
        (h, xd, keep), parts = saved, self.by_part(dy)
        dh = torch.baddbmm(h, parts, self.ups, beta=0, alpha=self.alpha)  # [G, N, r]

        def weights() -> None:
            dups = self.dups.view_as(self.ups)
            torch.baddbmm(dups, parts.transpose(1, 2), h, beta=0, alpha=self.alpha, out=dups)
            torch.bmm(dh.transpose(1, 2), xd, out=self.ddown.view_as(self.down))

        self.arena.aside(weights)
        if not need_dx:
            return None
        dxd = torch.bmm(dh, self.down)  # [G, N, in]
        if keep is not None:
            dxd = aten.native_dropout_backward(dxd, keep, 1 / (1 - self.p))
        return (dxd[0] if len(dxd) == 1 else dxd.sum(0)).addmm_(dy, self.weight)


def device_lora(arena: Arena, modules: list[nn.Module]) -> LoraLinear:
    adapted = [m for m in modules if hasattr(m, "lora_A")]
    alike = len({m.scaling[m.active_adapters[0]] for m in adapted}) == 1
    return (DeviceLoraLinear if alike and len(adapted) == len(modules) else LoraLinear)(arena, modules)


def apply(linear: Linear, x: Tensor, draw: Draw) -> tuple[Tensor, tuple]:
    """x: [n, in], any dtype; the cast is the copy into the product's input."""
    if x.dtype == linear.weight.dtype and x.is_contiguous() and not linear.joint:
        return linear.forward(x, draw)
    full, part = linear.buffer(len(x))
    part.copy_(x)
    return linear.forward(full, draw)


def make_linear(
    arena: Arena,
    modules: list[nn.Module],
    lora: Callable[..., LoraLinear],
    plain: Callable[..., Linear] = Linear,
) -> Linear:
    return (lora if any(hasattr(m, "lora_A") for m in modules) else plain)(arena, modules)
