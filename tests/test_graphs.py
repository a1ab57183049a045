"""The way of a GPU, taken on the CPU: all of it but the captures themselves, the attention and Triton's kernel."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_fast import adapted, batch, grads, reference, tiny
from torch import Tensor

from fast import FastClassifier
from graphs import Passes
from linear import DeviceLoraLinear
from optim import GraphedAdamW, adamw_for

pytestmark = pytest.mark.usefixtures("way_of_a_gpu")


def gradients(fast: FastClassifier, ids: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
    fast.arena.reset_grad()
    F.cross_entropy(fast(ids, lengths), labels).backward()
    fast.arena.widen()
    return fast.arena.grad.clone()


@pytest.mark.parametrize("make", [tiny, lambda: adapted(tiny())])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_an_earlier_batch_left_behind_a_shorter_one_is_not_seen(make: Callable, precision: str):
    used, long, short = FastClassifier(make(), precision), batch(1, length=14), batch(2, length=10)
    expected = gradients(FastClassifier(make(), precision), *short)
    assert not torch.equal(gradients(used, *long), expected)
    for _ in range(3):
        assert torch.equal(gradients(used, *short), expected)
    assert [key[:2] for key in used.passes.found] == [(6, 16)]  # one shape for both


@pytest.mark.parametrize("most", [Passes.MOST, 0])
def test_a_pass_begun_before_another_has_ended_keeps_its_numbers(monkeypatch, most: int):
    monkeypatch.setattr(Passes, "MOST", most)
    fast, batches = FastClassifier(tiny(), "fp32"), [batch(number) for number in range(3)]
    expected = [gradients(fast, *one) for one in batches]

    def loss(number: int) -> Tensor:
        ids, lengths, labels = batches[number]
        return F.cross_entropy(fast(ids, lengths), labels)

    def backward(loss: Tensor, number: int) -> None:
        fast.arena.reset_grad()
        loss.backward()
        assert torch.equal(fast.arena.grad, expected[number])

    first, second = loss(0), loss(1)
    backward(second, 1)
    third = loss(2)  # while the first is still to go back
    backward(first, 0)
    backward(third, 2)
    loss(0)  # dropped: nothing goes back
    backward(loss(1), 1)


def test_texts_of_the_greatest_length_fit():
    fast = FastClassifier(tiny().eval(), "fp32")  # of 20 positions, no multiple of 8
    ids, lengths, _ = batch(length=20)
    with torch.inference_mode():
        assert torch.equal(fast(ids, lengths), fast(ids, lengths))


def test_a_gradient_that_is_not_finite_changes_nothing_and_counts_for_nothing():
    finals = []
    for poisoned in (True, False):
        fast = FastClassifier(tiny(), "fp32")
        optimizer = adamw_for(fast, lr=1e-2)
        assert isinstance(optimizer, GraphedAdamW)
        for step in range(4):
            if poisoned and step == 2:
                gradients(fast, *batch(9))
                fast.arena.grad[5] = float("inf")
                assert not optimizer.step().isfinite()
                optimizer.zero_grad()
            gradients(fast, *batch(step))
            assert optimizer.step().isfinite()
            optimizer.zero_grad()
        assert optimizer.state_dict()["steps"] == 4
        finals.append(fast.arena.flat.clone())
    assert torch.equal(*finals)


@pytest.mark.parametrize("config", [{}, {"alpha_pattern": {"q_lin": 16}}, {"target_modules": ["q_lin", "v_lin"]}])
def test_adapters_that_are_not_alike_are_computed_too(config: dict):
    model, other = adapted(tiny(), **config), adapted(tiny(), **config)
    fast, (ids, lengths, labels) = FastClassifier(model, "fp32"), batch()
    assert isinstance(fast.layers[0].qkv, DeviceLoraLinear) == (not config)
    F.cross_entropy(fast(ids, lengths), labels).backward()
    F.cross_entropy(reference(other, ids, lengths), labels).backward()
    expected = grads(other)
    for name, gradient in grads(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)
