"""The fast path against what it replaces: the Hugging Face and PEFT modules, and autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from dropout import Draw
from fast import FastClassifier, supports
from optim import FastAdamW, adamw_for

pytestmark = pytest.mark.usefixtures("both_arithmetics")

TARGETS = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
HEAD = ["pre_classifier", "classifier"]


def tiny(dropout: float = 0.0, layers: int = 2, dim: int = 16, **config) -> nn.Module:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=60, dim=dim, hidden_dim=2 * dim, n_layers=layers, n_heads=2, num_labels=3,
        dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout, max_position_embeddings=20, **config,
    )  # fmt: skip
    model = DistilBertForSequenceClassification(config)
    for p in model.parameters():  # far from the near-zero initialisation, where every mistake looks small
        p.data.add_(torch.randn_like(p) * 0.3)
    return model.train()


def adapted(model: nn.Module, lora_dropout: float = 0.0, **config) -> nn.Module:
    config = {"target_modules": TARGETS, "r": 4, "lora_alpha": 8} | config
    model = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", lora_dropout=lora_dropout, modules_to_save=HEAD, **config)
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model.train()


def batch(seed: int = 0, b: int = 6, length: int = 9, padded: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (b,), generator=g) if padded else torch.full((b,), length)
    lengths[0] = length
    ids = torch.randint(1, 60, (b, length), generator=g) * (torch.arange(length) < lengths[:, None])
    return ids, lengths, torch.randint(0, 3, (b,), generator=g)


def reference(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long()).logits


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


MODELS = {
    "full": lambda p=0.0: tiny(p),
    "one layer": lambda p=0.0: tiny(p, layers=1),
    "frozen embeddings": lambda p=0.0: _freeze(tiny(p), "embeddings"),
    "head only": lambda p=0.0: _freeze(tiny(p), "distilbert"),
    "lora": lambda p=0.0: adapted(tiny(p), p),
    "lora q v": lambda p=0.0: adapted(tiny(p), p, target_modules=["q_lin", "v_lin"]),
    "rslora k lin2": lambda p=0.0: adapted(tiny(p), p, target_modules=["k_lin", "lin2"], use_rslora=True),
    "lora last layer": lambda p=0.0: adapted(tiny(p), p, layers_to_transform=[1], layers_pattern="layer"),
}


def _freeze(model: nn.Module, part: str) -> nn.Module:
    for name, p in model.named_parameters():
        p.requires_grad_(part not in name)
    return model


def train_steps(fast: FastClassifier, optimizer: FastAdamW, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids, lengths, labels = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(fast(ids, lengths), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_fp32_logits_and_gradients_are_the_modules_own(kind: str, padded: bool):
    model = MODELS[kind]()
    other = copy.deepcopy(model)
    ids, lengths, labels = batch(padded=padded)
    fast = FastClassifier(model, "fp32")
    logits, expected = fast(ids, lengths), reference(other, ids, lengths)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(expected, labels).backward()
    mine, theirs = grads(model), grads(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(
            mine[name], theirs[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_backward_uses_the_masks_of_forward(kind: str):
    """With dropout there is no reference to compare with: check the slope along the gradient instead."""
    model = MODELS[kind](0.3)
    fast, (ids, lengths, labels) = FastClassifier(model, "fp32"), batch()

    def loss() -> Tensor:
        torch.manual_seed(3)
        return F.cross_entropy(fast(ids, lengths), labels)

    loss().backward()
    direction = {p: p.grad / 100 for p in model.parameters() if p.requires_grad}
    slope = sum((p.grad * d).sum() for p, d in direction.items())
    ends = []
    for sign in (1, -2):
        for p, d in direction.items():
            p.data += sign * d * 0.005
        fast.arena.sync()
        with torch.no_grad():
            ends.append(loss())
    assert ((ends[0] - ends[1]) / 0.01).item() == pytest.approx(slope.item(), rel=0.02)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dropout_is_on_in_training_only_and_follows_the_generator(kind: str):
    model = MODELS[kind](0.3)
    fast, (ids, lengths, _) = FastClassifier(model, "fp32"), batch()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = fast(ids, lengths), fast(ids, lengths)
    torch.set_rng_state(state)
    assert torch.equal(first, fast(ids, lengths)) and not torch.allclose(first, second)
    model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(fast(ids, lengths), reference(model, ids, lengths), atol=1e-5, rtol=1e-5)


def test_masks_have_the_right_rate_and_do_not_depend_on_the_number_of_processes():
    torch.manual_seed(0)
    keep = Draw(True, 400)((400, 1001), 0.1, torch.empty(0))
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert keep.mean().item() == pytest.approx(0.9, abs=0.003)
    assert torch.corrcoef(keep.view(-1)[: 4 * 100_000].view(-1, 4).T).triu(1).abs().max() < 0.02
    shards = []
    for rank in (0, 1):
        torch.manual_seed(0)
        rows, first = (150, 0) if rank == 0 else (250, 150)
        shards.append(Draw(True, rows, first, 400)((rows, 1001), 0.1, torch.empty(0)))
    assert torch.equal(torch.cat(shards), keep)
    assert Draw(False)((2, 2), 0.1, torch.empty(0)) is None and Draw(True)((2, 2), 0.0, torch.empty(0)) is None


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_shards_give_one_processes_gradient(kind: str):
    model = MODELS[kind](0.2)
    fast, (ids, lengths, labels) = FastClassifier(model, "fp32", shared=True), batch()

    def run(part: slice) -> dict[str, Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        fast.arena.reset_grad()
        fast.arena.grad.zero_()
        logits = fast(ids[part], lengths[part], part.start, len(ids))
        F.cross_entropy(logits, labels[part], reduction="sum").backward()
        return grads(model)

    whole, left, right = run(slice(0, len(ids))), run(slice(0, 4)), run(slice(4, len(ids)))  # of unequal size
    for name in whole:
        torch.testing.assert_close(left[name] + right[name], whole[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_bf16_losses_follow_autocast(kind: str):
    """On most streams of batches: on a few of them rounding alone parts any two computations by up to .06."""
    apart = []
    for stream in range(5):
        model = MODELS[kind]()
        other = copy.deepcopy(model)
        fast = FastClassifier(model, "bf16")
        mine, theirs = adamw_for(fast, lr=1e-3), torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.01)
        differences = []
        for step in range(20):
            ids, lengths, labels = batch(100 * stream + step)
            loss = F.cross_entropy(fast(ids, lengths), labels)
            mine.zero_grad(), loss.backward(), mine.step()
            with torch.autocast("cpu", torch.bfloat16):
                expected = reference(other, ids, lengths)
            expected = F.cross_entropy(expected.float(), labels)
            theirs.zero_grad(), expected.backward()
            nn.utils.clip_grad_norm_(other.parameters(), 1.0)
            theirs.step()
            differences.append(abs(loss.item() - expected.item()))
        apart.append(max(differences))
    assert sorted(apart)[2] < 0.03


@pytest.mark.parametrize("k", [1, 2])
def test_cached_prefix_gives_the_same_training(k: int):
    def run(cached: bool) -> tuple[list[float], dict]:
        layers = list(range(3 - k, 3))
        model = adapted(tiny(0.2, layers=3), 0.2, layers_to_transform=layers, layers_pattern="layer")
        fast = FastClassifier(model, "bf16", frozen_prefix=3 - k)
        optimizer = adamw_for(fast, lr=1e-3)
        torch.manual_seed(0)
        losses = []
        cache = [fast.prefix(*batch(i)[:2]) for i in range(3)] if cached else None
        for _ in range(2):
            for i in range(3):
                ids, lengths, labels = batch(i)
                logits = fast.suffix(cache[i], lengths) if cached else fast(ids, lengths)
                optimizer.zero_grad()
                loss = F.cross_entropy(logits, labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses, model.state_dict()

    (losses, weights), (expected, theirs) = run(True), run(False)
    assert losses == expected and all(torch.equal(weights[n], theirs[n]) for n in weights)


def test_saving_and_loading_see_an_ordinary_model(tmp_path):
    model = tiny(0.1)
    fast = FastClassifier(model, "bf16")
    optimizer = adamw_for(fast, lr=1e-2)
    train_steps(fast, optimizer, range(4))
    optimizer.flush()
    model.save_pretrained(tmp_path)
    loaded = DistilBertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, p), q in zip(model.named_parameters(), loaded.parameters()):
        assert torch.equal(p, q), name
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 3 * 4 * sum(p.numel() for p in model.parameters())
    other = tiny()
    stale = FastClassifier(other, "bf16")
    other.load_state_dict(model.state_dict())  # the bf16 copy notices
    ids, lengths, _ = batch()
    model.eval(), other.eval()
    with torch.inference_mode():
        assert torch.equal(fast(ids, lengths), stale(ids, lengths))


def test_lora_adapter_round_trip(tmp_path):
    from peft import PeftModel

    model = adapted(tiny(), 0.1)
    fast = FastClassifier(model, "fp32")
    train_steps(fast, adamw_for(fast, lr=1e-2), range(4))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    model.eval()
    ids, lengths, _ = batch()
    with torch.inference_mode():
        torch.testing.assert_close(fast(ids, lengths), reference(loaded, ids, lengths), atol=1e-5, rtol=1e-5)


def test_supports_says_why_not():
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    assert supports(tiny()) is None and supports(adapted(tiny())) is None
    assert "BertForSequenceClassification" in supports(BertForSequenceClassification(bert))
    assert "relu" in supports(tiny(activation="relu"))
    assert "DoRA" in supports(adapted(tiny(), use_dora=True))
    assert "ranks" in supports(adapted(tiny(), rank_pattern={"q_lin": 2}))
    assert "float32" in supports(tiny().to(torch.bfloat16))
    two = adapted(tiny())
    two.add_adapter("second", LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS))
    assert "one active" in supports(two)
    with pytest.raises(ValueError, match="relu"):
        FastClassifier(tiny(activation="relu"))
