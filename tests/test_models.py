"""LoRA and the files of a saved model."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import models

TEXTS = ["a good film", "this is a really bad and long review of it", "fine"]


@pytest.fixture
def loaded(tiny_model):
    """(model, tokenised texts); the tiny DistilBERT with a fresh head, in eval mode."""
    from models import find_model, load_classifier, load_tokenizer

    source = find_model(str(tiny_model))
    tokenizer, _ = load_tokenizer(source, None)
    torch.manual_seed(0)
    model = load_classifier(source, ("negative", "positive")).eval()
    return model, tokenizer(TEXTS, padding=True, return_tensors="pt")


def _shake(model: torch.nn.Module) -> None:
    """Give every adapter a random B, as training would."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=3.0)


def test_lora_starts_as_no_change(loaded):
    from models import add_lora

    model, inputs = loaded
    before = model(**inputs).logits
    assert torch.equal(add_lora(model, 4, 8, 0.1).eval()(**inputs).logits, before)


def test_merged_equals_unmerged(loaded):
    from models import add_lora

    model, inputs = loaded
    before = model(**inputs).logits
    adapted = add_lora(model, 4, 8, 0.1).eval()
    _shake(adapted)
    unmerged = adapted(**inputs).logits
    assert (unmerged - before).abs().max() > 1e-3
    torch.testing.assert_close(adapted.merge_and_unload()(**inputs).logits, unmerged, rtol=0, atol=1e-5)


def test_a_step_of_lora_changes_adapters_and_head_only(loaded):
    from models import add_lora

    model, inputs = loaded
    adapted = add_lora(model, 4, 8, 0.0)
    _shake(adapted)
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.1)
    adapted(**inputs).logits.square().sum().backward()
    optimizer.step()
    for name, weight in adapted.named_parameters():
        trained = "lora" in name or "modules_to_save" in name
        assert torch.equal(weight, before[name]) != trained, name


def test_best_weights_come_back(loaded):
    from models import load_trained_state, trained_state

    model, inputs = loaded
    before, kept = model(**inputs).logits, trained_state(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    assert not torch.equal(model(**inputs).logits, before)
    load_trained_state(model, kept)
    assert torch.equal(model(**inputs).logits, before)


def test_a_bf16_checkpoint_is_trained_in_fp32(tiny_model, tmp_path):
    from transformers import AutoModelForMaskedLM

    from models import find_model, load_classifier

    AutoModelForMaskedLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load_classifier(find_model(str(tmp_path)), ("a", "b"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_the_head_is_for_one_label_whatever_the_checkpoint_was_for(tiny_model, tmp_path):
    from models import find_model, load_classifier

    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"  # pipeline() would take the sigmoid
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = load_classifier(find_model(str(tmp_path / "model")), ("a", "b"))
    assert model.config.problem_type == "single_label_classification"


def test_a_part_of_the_default_in_the_cache_is_not_the_default(tiny_model, monkeypatch):
    """A download that was stopped: offline it cannot be finished, and the packaged encoder takes its place."""
    monkeypatch.setattr(models.packaged, "encoder_folder", lambda: tiny_model)
    cache = Path(os.environ["HF_HOME"], "hub", "models--distilbert--distilbert-base-uncased")
    snapshot = cache / "snapshots" / ("5" * 40)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("5" * 40)
    try:
        for name in ("config.json", "tokenizer.json"):
            assert models.find_model(None).kind == "packaged"
            shutil.copy(tiny_model / name, snapshot)
        assert models.find_model(None).kind == "packaged"
        shutil.copy(tiny_model / "model.safetensors", snapshot)
        assert models.find_model(None).kind == "hub"
    finally:
        shutil.rmtree(cache)


def test_the_fingerprint_is_of_the_encoder_alone(tiny_model):
    from models import encoder_fingerprint, find_model, load_classifier

    source = find_model(str(tiny_model))
    one, two = load_classifier(source, ("a", "b")), load_classifier(source, ("a", "b", "c"))
    assert encoder_fingerprint(one) == encoder_fingerprint(two)
    with torch.no_grad():
        next(two.base_model.parameters())[0, 0] += 1e-3
    assert encoder_fingerprint(one) != encoder_fingerprint(two)


@pytest.mark.parametrize("layers", [1, 2])
def test_lora_on_the_last_layers_only(loaded, layers):
    from models import add_lora

    adapted = add_lora(loaded[0], 4, 8, 0.1, layers)
    found = {name.split("layer.")[1].split(".")[0] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert found == ({"1"} if layers == 1 else {"0", "1"})
