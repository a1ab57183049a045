"""Recorded passes: the same bits as passes computed anew."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_fast import adapted, batch, tiny
from torch import Tensor

import kernels
from dropout import random_seeds
from fast import FastClassifier, Replay
from optim import FastAdamW
from tape import Workspace, empty, within

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler")
PRECISIONS = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not kernels.tiles(), reason="no bf16 products"))]

SHAPES = ((6, 9), (4, 20), (6, 9), (2, 3), (4, 20), (6, 9))


def full() -> torch.nn.Module:
    return tiny(0.1, layers=3, dim=32)


def lora() -> torch.nn.Module:
    return adapted(full(), lora_dropout=0.1)


def last_layer() -> torch.nn.Module:
    return adapted(full(), lora_dropout=0.1, layers_to_transform=[2], layers_pattern="layer")


def steps(model: torch.nn.Module, precision: str, replays: bool, parts: int, prefix: int) -> tuple[list[float], Tensor]:
    """Losses of a few steps on batches of returning shapes, weights after them, and what these make of the batches."""
    torch.manual_seed(1)
    model = copy.deepcopy(model).train()
    fast = FastClassifier(model, precision, prefix)
    assert fast.recordable
    fast.recordable = replays
    optimizer, losses = FastAdamW(fast, lr=1e-2), []
    for step, (b, length) in enumerate(SHAPES):
        optimizer.zero_grad()
        for part in range(parts):
            ids, lengths, labels = batch(10 * step + part, b, length)
            loss = F.cross_entropy(fast(ids, lengths), labels)
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    optimizer.flush()
    model.eval()
    with torch.inference_mode():
        logits = [fast(*batch(step, b, length)[:2]) for step, (b, length) in enumerate(SHAPES)]
    assert len(fast.replays) == (min(2 * len(set(SHAPES)), Replay.MOST) if replays else 0)
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()] + [x.flatten() for x in logits])


@pytest.mark.parametrize(("make", "prefix"), [(full, 0), (lora, 0), (last_layer, 0), (last_layer, 2)])
@pytest.mark.parametrize(("parts", "most"), [(1, 512), (2, 512), (1, 2)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_replay_gives_the_bits_of_computing_anew(
    make: Callable, prefix: int, parts: int, most: int, precision: str, monkeypatch
):
    monkeypatch.setattr(Replay, "MOST", most)
    (replayed, weights), (computed, expected) = (
        steps(make(), precision, replays, parts, prefix) for replays in (True, False)
    )
    assert replayed == computed and torch.equal(weights, expected)
    assert len(set(replayed)) == len(replayed)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_pass_begun_before_another_has_ended_keeps_its_numbers(precision: str):
    fast = FastClassifier(tiny(dim=32), precision)
    ids, lengths, labels = batch()
    others = ids.flip(0)

    def gradients(*losses: Callable[[], Tensor]) -> list[Tensor]:
        """Of each loss, where all are computed before the first goes back."""
        found = []
        for loss in [loss() for loss in losses]:
            fast.arena.reset_grad()
            loss.backward()
            found.append(fast.arena.matrix_grads.clone())
        return found

    def one() -> Tensor:
        return F.cross_entropy(fast(ids, lengths), labels)

    def other() -> Tensor:
        return F.cross_entropy(fast(others, lengths), labels)

    expected = gradients(one) + gradients(other)
    assert not torch.equal(*expected)
    for found in (gradients(one, other), gradients(one, other)):
        assert all(map(torch.equal, found, expected))
    one()  # dropped: nothing goes back
    assert fast.pending() is None and torch.equal(gradients(other)[0], expected[1])


def test_seeds_drawn_together_are_those_drawn_one_by_one():
    torch.manual_seed(3)
    together = random_seeds(torch.empty(Replay.SEEDS, 1, dtype=torch.int64))
    torch.manual_seed(3)
    assert torch.equal(together, torch.stack([random_seeds(torch.empty(1, dtype=torch.int64)) for _ in together]))


def test_a_workspace_gives_memory_out_again_when_no_tensor_lies_on_it_and_never_moves():
    space = Workspace()

    def fill(tensors: list[Tensor]) -> None:
        for i, tensor in enumerate(tensors):
            tensor.fill_(i)
        assert [tensor.unique().tolist() for tensor in tensors] == [[i] for i in range(len(tensors))]  # none overlap

    sizes = [(3, 5), (1000, 1000), (7,), (1500, 1000), (64,), (4000, 5000)]  # the last is larger than a chunk
    first = [space.empty(size, torch.float32) for size in sizes]
    fill(first)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in first)
    addresses, part, kept = [t.data_ptr() for t in first], first[1][5:, 3], first[3]
    del first
    again = space.empty((1000, 1000), torch.float32)
    assert again.data_ptr() != addresses[1]  # a view of the one before is alive
    assert space.empty((2, 5), torch.float32).data_ptr() == addresses[0]
    fill([part, kept, again])
    del part, kept, again
    for _ in range(3):
        assert [tensor.data_ptr() for tensor in [space.empty(size, torch.float32) for size in sizes]] == addresses
    assert space.empty((0, 4), torch.bfloat16).shape == (0, 4)
    assert not any(space.taken.values()) and len(space.chunks) == 2


def test_workspaces_that_share_chunks_give_out_the_same_memory():
    chunks: list[Tensor] = []
    one, other = Workspace(chunks).empty((9, 9), torch.float32), Workspace(chunks).empty((3, 3), torch.float32)
    assert one.data_ptr() == other.data_ptr() and len(chunks) == 1


def test_a_workspace_is_memory_of_the_cpu_alone():
    """With CUDA, layers.py computes within the workspace that the prefix cache is filled in."""
    with within(space := Workspace()):
        assert empty(3, device=torch.device("meta")).device.type == "meta" and not space.chunks
        assert empty(3, device=torch.device("cpu")).device.type == "cpu" and space.chunks
