"""The frozen prefix: with the cache, without it, and on transformers' own modules, one and the same run."""

import pytest
from conftest import read_json, read_lines

import packaged
import prefix
import train

LAST = ("--finetune", "--peft", "--lora_layers", "1", "--lora_r", "4", "--lr", "5e-3", "--epochs", "2")


def losses(run) -> list[float]:
    return [line["train/loss"] for line in read_lines(run / "metrics.jsonl") if "train/loss" in line]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cache_changes_nothing(cli, monkeypatch, precision):
    assert cli(*LAST, "--precision", precision)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(prefix, "_fill", lambda *_: pytest.fail("what the first has written was not read"))
        assert cli(*LAST, "--precision", precision)[0] == 0
    monkeypatch.setattr(train, "cache_prefix", lambda job, *_: job.splits)
    assert cli(*LAST, "--precision", precision)[0] == 0  # computes the frozen layers in every step
    runs = sorted(cli.runs.iterdir())
    filling = [read_json(run / "result.json")["cache_seconds"] for run in runs]
    assert filling[0] > 0 == filling[2]
    first, *others = [
        (losses(run), [row["probability"] for row in read_lines(run / "predictions.jsonl")]) for run in runs
    ]
    assert len(others) == 2 and first == others[0]  # written or read: the same numbers
    near = {"fp32": 1e-6, "bf16": 2e-3}[precision]  # computed in batches of another size: products round otherwise
    assert others[1][0] == pytest.approx(first[0], abs=near) and others[1][1] == pytest.approx(first[1], abs=near)


@pytest.mark.usefixtures("no_curves")
def test_other_weights_have_files_of_their_own(cli, nudged_model):
    """Of the same name, shape and config."""
    folder, seen = packaged.cache_dir() / "prefix", []
    for words in ((), ("--model", str(nudged_model))):
        assert cli(*LAST, "--epochs", "1", *words)[0] == 0
        seen.append({path.name for path in folder.iterdir()})
    assert len(seen[1] - seen[0]) == 3


def test_it_is_the_run_that_peft_would_make(cli, tiny_model, tmp_path):
    """Without dropout (the two draw their masks differently) and in fp32, up to rounding."""
    config = (tiny_model / "config.json").read_text()
    model = tmp_path / "no-dropout"
    model.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "config.json").write_text(config.replace('dropout": 0.1', 'dropout": 0.0').replace("0.2", "0.0"))
    words = (*LAST, "--precision", "fp32", "--model", str(model), "--lora_dropout", "0")
    assert cli(*words)[0] == 0 and cli(*words, "--plain")[0] == 0
    fast, plain = sorted(cli.runs.iterdir())
    assert read_json(fast / "result.json")["engine"].startswith("fast")
    assert losses(fast) == pytest.approx(losses(plain), abs=1e-4)


def test_the_frozen_layers_have_no_dropout(cli):
    """In the plain engine too: encoder in evaluation, last block in training."""
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    from device import open_device
    from engine import make_engine
    from models import add_lora, encoder_blocks

    config = DistilBertConfig(vocab_size=30, n_layers=3, dim=16, n_heads=2, hidden_dim=32)
    base = DistilBertForSequenceClassification(config)
    model = add_lora(base, 2, 4, 0.1, 1)
    accelerator, _ = open_device("cpu", "fp32")
    settings = {"precision": "fp32", "lr": 1e-3, "weight_decay": 0.0, "max_grad_norm": 1.0}
    make_engine(model, accelerator, **settings, frozen_prefix=2, plain=True).train_mode()
    dropping = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Dropout) and part.training}
    assert dropping and all("layer.2." in name or "distilbert" not in name for name in dropping)
    assert [block.training for block in encoder_blocks(base)[1]] == [False, False, True]
