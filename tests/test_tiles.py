"""Products on tiles, against the same in double precision and against PyTorch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_fast import adapted, batch, tiny
from torch import Tensor, nn

import kernels
from dropout import Draw
from fast import FastClassifier
from fused import TiledLoraLinear
from optim import FastAdamW
from tiles import Matrix, TiledMatrix, gradient, matrix

pytestmark = pytest.mark.skipif(not kernels.tiles(), reason="no bf16 products of our own here, or no compiler")

ROUNDING = 2**-8  # of bf16, to nearest


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def assert_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    """As the exact result rounded to bf16, but for the fp32 rounding of the sums."""
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING, atol=1e-4 * exact.abs().max().item())


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    """The same after several roundings, one of which may fall to the other side."""
    torch.testing.assert_close(found.double(), exact, rtol=2 * ROUNDING, atol=4e-3 * exact.abs().max().item())


@pytest.mark.parametrize("n", [1, 16, 17, 31, 32, 45, 208, 433])
@pytest.mark.parametrize(("out", "width"), [(32, 64), (96, 32), (64, 384)])
def test_products_are_exact_to_rounding(n: int, out: int, width: int):
    torch.manual_seed(n)
    w, x, dy = numbers(out, width), numbers(n, width), numbers(n, out)
    made = matrix(w)
    assert isinstance(made, TiledMatrix)
    assert_rounded(made.forward(x), x.double() @ w.double().t())
    assert_rounded(made.backward(dy), dy.double() @ w.double())
    assert_rounded(gradient(dy, x), dy.double().t() @ x.double())


def test_rows_may_be_parts_of_longer_ones():
    w, x, dy = numbers(64, 32), numbers(40, 96)[:, 32:64], numbers(40, 100)[:, 5:69]
    assert_rounded(matrix(w).forward(x), x.double() @ w.double().t())
    assert_rounded(gradient(dy, x), dy.double().t() @ x.double())


def test_columns_packed_anew_are_all_that_changes():
    w, x = numbers(64, 96), numbers(20, 96)
    made = matrix(w)
    w[:] = numbers(64, 96)
    before = made.forward(x)
    made.pack(64)
    change = made.forward(x).double() - before.double()
    assert change.abs().max() > 1
    made.pack()
    assert_rounded(made.forward(x), x.double() @ w.double().t())


def test_the_number_of_threads_does_not_change_a_bit():
    w, x, dy = numbers(96, 64), numbers(333, 64), numbers(333, 96)
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            found.append((matrix(w).forward(x), matrix(w).backward(dy), gradient(dy, x)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others))


@pytest.mark.parametrize("width", [24, 40])
def test_other_widths_are_left_to_pytorch(width: int):
    assert type(matrix(numbers(64, width))) is Matrix and type(matrix(numbers(width, 64))) is Matrix
    assert type(matrix(torch.randn(64, width))) is Matrix
    x, dy = numbers(10, width), numbers(10, 64)
    torch.testing.assert_close(gradient(dy, x), dy.t() @ x)


@pytest.mark.parametrize(
    "make", [lambda p: tiny(p, dim=32), lambda p: adapted(tiny(p, dim=32), p)], ids=["full", "lora"]
)
def test_three_steps_are_those_without_tiles(monkeypatch, make):
    """Also after others wrote to the weights: what is packed follows. With most batches: a few are all rounding."""
    alike = []
    for seed in range(5):
        one = make(0.1)
        models, found = (one, copy.deepcopy(one)), []
        ids, lengths, labels = batch(seed)
        for tiles, model in zip((True, False), models):
            with monkeypatch.context() as patch:
                if not tiles:
                    patch.setattr(kernels, "tiles", lambda: False)
                fast = FastClassifier(model, "bf16")
                assert type(fast.layers[0].lin1.matrix) is (TiledMatrix if tiles else Matrix)
                found.append(gradients_of_three_steps(fast, model, ids, lengths, labels))
        alike.append([F.cosine_similarity(on, off, dim=0).item() for on, off in zip(*found)])
    for step in zip(*alike):
        assert sorted(step)[2] > 0.995  # without tiles LoRA's A is in fp32


def gradients_of_three_steps(fast: FastClassifier, model: nn.Module, *given: Tensor) -> list[Tensor]:
    ids, lengths, labels = given
    grads = []
    for step in range(3):
        torch.manual_seed(step)
        fast.arena.reset_grad()
        F.cross_entropy(fast(ids, lengths), labels).backward()
        fast.arena.widen()
        grads.append(fast.arena.grad.clone())
        with torch.no_grad():
            for p in model.parameters():  # of frozen ones too
                p.mul_(1.1 + 0.1 * step)
    return grads


def test_a_step_packs_what_it_changed():
    fast = FastClassifier(tiny(dim=32), "bf16")
    optimizer = FastAdamW(fast, lr=1e-2)
    for parts in (1, 2):  # gradients in bf16, and summed in fp32
        optimizer.zero_grad()
        for _ in range(parts):
            ids, lengths, labels = batch()
            F.cross_entropy(fast(ids, lengths), labels).backward()
        every = [part.double() for _, part in fast.arena.parts()] + [optimizer._table_grad()[1].double()]
        norm = sum((part**2).sum() for part in every).sqrt().item()
        assert optimizer.step().item() == pytest.approx(norm, rel=1e-3)
        assert len(fast.arena.packed) == 8  # of the two layers, q of the last one apart and no keys and values
        for start, found in fast.arena.packed.items():
            size = found.w.numel()
            expected = TiledMatrix(fast.arena.flat[start : start + size].bfloat16().view_as(found.w))
            assert torch.equal(found.packed, expected.packed)
            assert torch.equal(found.packed_back, expected.packed_back)


@pytest.mark.parametrize("n", [1, 16, 45])
@pytest.mark.parametrize(("r", "parts"), [(4, (0,)), (8, (0, 2)), (16, (0, 1, 2)), (40, (1,)), (64, (0, 1, 2))])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_an_adapted_layer_is_exact_to_rounding(n: int, r: int, parts: tuple[int, ...], p: float):
    """Forward and backward of y = x W^T + scaling (dropout(x) A^T) B^T, for adapters on some of three modules."""
    torch.manual_seed(n + r)
    names = [("q_lin", "k_lin", "v_lin")[part] for part in parts]
    model = adapted(tiny(dim=64), p, target_modules=names, r=r, lora_alpha=r // 2)
    (layer, *_) = FastClassifier(model, "bf16").layers
    linear, arena = layer.qkv, layer.qkv.arena
    assert type(linear) is TiledLoraLinear
    full, x = linear.buffer(n)
    x.copy_(torch.randn(n, 64))
    dy = numbers(n, 192)
    y, (_, drop) = linear.forward(full, Draw(p > 0, n), bias=False)
    kept = torch.ones(len(parts), n, 64).double()
    if p:
        kept = (drop[0] >= drop[1][:64]).double() / (1 - p)
    w, a = linear.weight.double(), linear.down.double()  # [192, 64], [G, r, 64]
    b = torch.stack([torch.mul(up, 0.5).double() for up in linear.up])  # [G, 64, r], scaling in bf16
    columns = [slice(64 * part, 64 * part + 64) for part in parts]
    h = [((x.double() * kept[g]) @ a[g].t()).bfloat16().double() for g in range(len(parts))]
    exact = x.double() @ w.t()
    for g, at in enumerate(columns):
        exact[:, at] += h[g] @ b[g].t()
    assert_rounded(y, exact)

    dx = linear.backward(dy, (full, drop))
    exact = dy.double() @ w
    for g, at in enumerate(columns):
        dh = (dy[:, at].double() @ b[g]).bfloat16().double()
        exact = (exact.bfloat16().double() if g == 0 else exact) + kept[g] * (dh @ a[g])
        assert_near(linear.ddown.view(len(parts), r, 64)[g], dh.t() @ (x.double() * kept[g]))
        assert_near(linear.dup[g], 0.5 * dy[:, at].double().t() @ h[g])
    assert_near(dx, exact)
    gradients = linear.ddown, linear.dups
    before = [half.clone() for half in gradients]
    linear.ddown.zero_(), linear.dups.zero_()
    assert linear.backward(dy, (full, drop), need_dx=False) is None
    assert all(map(torch.equal, gradients, before))
    for _ in range(2):
        with arena.adding():
            linear.backward(dy, (full, drop))
    for half, once in zip(gradients, before):
        twice = arena.grad[half.storage_offset() :][: half.numel()].view_as(half)
        torch.testing.assert_close(twice, 2 * once.float())
