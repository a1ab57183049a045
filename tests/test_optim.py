"""The optimiser against torch.optim.AdamW: every weight, and the embedding table that is updated row by row."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_fast import MODELS, batch, reference, tiny, train_steps
from torch import nn

import kernels
from fast import FastClassifier
from optim import LazyTable, adamw_for, compiled_adamw, kernel_rule

both = pytest.mark.usefixtures("both_arithmetics")


@both
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0])  # gradients near eps, usual, large
def test_lazy_table_is_dense_adamw(scale: float):
    """400 steps with a warm-up and decay, rows read rarely or often, gradients down to the size of eps."""
    g = torch.Generator().manual_seed(0)
    dense = nn.Parameter(torch.randn(40, 8, generator=g))
    lazy_weight = nn.Parameter(dense.detach().clone())
    optimizer = torch.optim.AdamW([dense], lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999))
    group = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}
    lazy = LazyTable(lazy_weight, group, compiled=kernels.library() is not None)
    start = dense.detach().clone()
    for step in range(400):
        group["lr"] = optimizer.param_groups[0]["lr"] = 1e-3 * min(step / 20, (400 - step) / 380)
        rows = (torch.rand(40, generator=g) < torch.logspace(-2.5, 0, 40)).nonzero().view(-1)
        grad = torch.randn(len(rows), 8, generator=g) * scale
        lazy.catch_up(rows)
        torch.testing.assert_close(lazy_weight[rows], dense[rows], atol=2e-6, rtol=1e-5)
        dense.grad = torch.zeros_like(dense).index_add_(0, rows, grad)
        optimizer.step()
        lazy.apply(rows, grad, None)
    lazy.flush()
    assert (dense - start).abs().max() > 0.03  # it moved
    torch.testing.assert_close(lazy_weight, dense, atol=2e-6, rtol=1e-5)
    state = optimizer.state[dense]
    torch.testing.assert_close(lazy.m, state["exp_avg"], rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(lazy.v, state["exp_avg_sq"], rtol=1e-4, atol=1e-6 * scale**2)


@pytest.mark.skipif(kernels.library() is None, reason="no compiler")
def test_the_compiled_update_is_that_of_float64_to_fp32_rounding():
    """1.0f - 0.999f is off by 1e-5: the second moment, and with it every first step, were."""
    g = torch.Generator().manual_seed(0)
    p = torch.zeros(1000)
    m, v, grads = torch.zeros(1000), torch.zeros(1000), torch.randn(5, 1000, generator=g)
    exact = nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    theirs = torch.optim.AdamW([exact], **group)
    for step, grad in enumerate(grads, 1):
        compiled_adamw(p, grad, m, v, kernel_rule(step, group, None), None)
        exact.grad = grad.double()
        theirs.step()
        assert ((p - exact).abs() / exact.abs().clamp(min=1e-6)).median() < 3e-7
        assert (v / theirs.state[exact]["exp_avg_sq"] - 1).abs().max() < 1e-6


@both
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("max_norm", [0.5, None])
def test_training_is_that_of_torch_adamw(kind: str, max_norm: float | None):
    model = MODELS[kind]()
    other = copy.deepcopy(model)
    fast = FastClassifier(model, "fp32")
    mine = adamw_for(fast, lr=1e-3, weight_decay=0.1, max_grad_norm=max_norm)
    trained = [p for p in other.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(
        [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
         {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}], lr=1e-3, eps=1e-5)  # fmt: skip
    for group in mine.param_groups:
        group["eps"] = 1e-5  # k_lin.bias has gradient 0 but for rounding: don't let Adam blow that up
    warm = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1.0, s / 4)) for o in (mine, theirs)]
    for step in range(12):
        ids, lengths, labels = batch(step)
        mine.zero_grad(), theirs.zero_grad()
        F.cross_entropy(fast(ids, lengths), labels).backward()
        F.cross_entropy(reference(other, ids, lengths), labels).backward()
        norm = nn.utils.clip_grad_norm_(trained, max_norm or 1e9)
        assert mine.step().item() == pytest.approx(norm.item(), rel=1e-4)
        theirs.step()
        [w.step() for w in warm]
    mine.flush()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q, atol=3e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@both
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_is_bit_for_bit_and_saving_changes_nothing(kind: str, precision: str):
    def fresh():
        model = MODELS[kind](0.1)
        fast = FastClassifier(model, precision)
        return model, fast, adamw_for(fast, lr=1e-2)

    model, fast, optimizer = fresh()
    torch.manual_seed(7)
    train_steps(fast, optimizer, range(5))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    expected = train_steps(fast, optimizer, range(5, 10))
    resumed, fast2, optimizer2 = fresh()
    resumed.load_state_dict(saved[0]), optimizer2.load_state_dict(saved[1]), torch.set_rng_state(saved[2])
    assert train_steps(fast2, optimizer2, range(5, 10)) == expected
    optimizer.flush(), optimizer2.flush()
    for (name, p), q in zip(model.named_parameters(), resumed.parameters()):
        assert torch.equal(p, q), name


@both
def test_micro_batches_add_up_and_zero_grad_starts_afresh():
    model = tiny()
    fast = FastClassifier(model, "fp32")
    optimizer = adamw_for(fast, lr=1e-3, max_grad_norm=None)
    norms = []
    for parts in ([slice(None)], [slice(3), slice(3, None)], [slice(None)]):
        ids, lengths, labels = batch()
        optimizer.zero_grad()
        for part in parts:
            (F.cross_entropy(fast(ids[part], lengths[part]), labels[part]) / len(parts)).backward()
        rows, table = optimizer._table_grad() if optimizer.lazy else (torch.empty(0), torch.empty(0))
        norms.append((fast.arena.grad.clone(), rows, table))
    for flat, rows, table in norms[1:]:
        torch.testing.assert_close(flat, norms[0][0], atol=1e-6, rtol=1e-4)
        assert torch.equal(rows, norms[0][1])
        torch.testing.assert_close(table, norms[0][2], atol=1e-6, rtol=1e-4)
