"""The loop, through the real command line on a 2-layer, 16-wide model, and its parts against plain PyTorch."""

import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import read_json, read_lines
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

import tracking
import train

LEARNS = ("--lr", "5e-3", "--epochs", "15", "--batch_size", "8")  # 6 of 6 seeds reach 0.9
BRIEF = ("--epochs", "2", "--lr", "1e-3")
RESULT_KEYS = {
    "val",
    "test",
    "best_epoch",
    "trainable_parameters",
    "total_parameters",
    "train_seconds",
    "samples_per_second",
    "peak_memory_bytes",
    "precision",
    "device",
}


@pytest.mark.parametrize(
    ("method", "accuracy"),
    [((), 0.9), (("--peft", "--lora_r", "4"), 0.0)],  # LoRA cannot move the random embeddings
)
def test_a_run_learns_and_leaves_its_records(cli, method, accuracy):
    code, out, err = cli("--finetune", *LEARNS, *method)
    assert code == 0, err
    (run,) = cli.runs.iterdir()
    assert str(run) in out
    assert {"config.json", "metrics.jsonl", "result.json", "predictions.jsonl", "model", "curves.png"} <= {
        path.name for path in run.iterdir()
    }
    result, lines = read_json(run / "result.json"), read_lines(run / "metrics.jsonl")
    assert result.keys() >= RESULT_KEYS
    assert result["positive_class"] == "pos" and re.fullmatch(r"[0-9a-f]{40}\+?", result["git_commit"] or "0" * 40)
    assert result["samples_per_second"] * result["train_seconds"] == pytest.approx(15 * result["data"]["rows"]["train"])
    windows = [(line["step"], line["train/samples_per_second"]) for line in lines if "train/lr" in line]
    spent = sum(8 * (step - before) / rate for (before, _), (step, rate) in zip([(0, 0.0), *windows], windows))
    assert result["train_seconds"] == pytest.approx(spent)
    assert result["test"]["accuracy"] >= accuracy
    steps = 15 * 12
    assert [line["step"] for line in lines if "val/accuracy" in line] == list(range(12, steps + 1, 12))
    assert lines[-1]["step"] == steps and lines[-1]["test/accuracy"] == result["test"]["accuracy"]
    assert {"step", "epoch", "time", "train/loss", "train/lr", "train/samples_per_second"} <= lines[0].keys()
    accuracies = [line["val/accuracy"] for line in lines if "val/accuracy" in line]
    ranks = [(line["val/accuracy"], -line["val/loss"]) for line in lines if "val/accuracy" in line]
    assert result["best_epoch"] == 1 + ranks.index(max(ranks))  # of equals the one of the lower loss, then the earlier
    assert result["val"]["accuracy"] == max(accuracies)  # so the weights scored at the end are the best epoch's
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    if not method:
        assert losses[-1] < 0.98 * losses[0]


def test_test_rows_are_scored_once_at_the_end(cli, monkeypatch):
    asked, predict = [], train.predict_probabilities

    def asking(engine, split, accelerator):
        asked.append(split.key)
        return predict(engine, split, accelerator)

    monkeypatch.setattr(train, "predict_probabilities", asking)
    assert cli("--finetune", "--epochs", "3")[0] == 0
    validation, test = asked[-2:]
    assert validation != test and asked == [validation] * 4 + [test]


PASSED_ON = {
    "full": ["--weight_decay=5", "--max_grad_norm=0.001", "--warmup_ratio=0.5", "--max_length=4", "--batch_size=4"],
    "lora": ["--lora_alpha=1", "--lora_dropout=0.5", "--lora_r=2", "--lora_layers=1"],
    "plain": ["--max_grad_norm=0.001", "--weight_decay=5"],
}


@pytest.mark.parametrize("method", PASSED_ON)
@pytest.mark.usefixtures("no_curves")
def test_every_flag_reaches_the_training(cli, method):
    """Each alone gives other weights; that they are the right ones is held by the tests of the parts."""
    words = ("--finetune", *BRIEF, *{"lora": ["--peft", "--lora_r", "4"], "plain": ["--plain"]}.get(method, []))
    seen = {}
    for flag in ("--seed=42", *PASSED_ON[method]):  # the first is the default
        assert cli(*words, flag)[0] == 0
        run = max(cli.runs.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        name = "adapter_model" if method == "lora" else "model"
        seen[flag] = (run / "model" / f"{name}.safetensors").read_bytes()
    assert len(set(seen.values())) == len(seen)


@pytest.mark.usefixtures("no_curves")
def test_accumulated_steps_are_fewer(cli):
    assert cli("--finetune", *BRIEF, "--batch_size", "8", "--gradient_accumulation_steps", "3")[0] == 0
    (run,) = cli.runs.iterdir()
    assert read_json(run / "result.json")["steps"] == 2 * 4  # of 96 rows: 12 passes in 4 steps an epoch
    assert max(line["step"] for line in read_lines(run / "metrics.jsonl")) == 2 * 4


@pytest.mark.parametrize("feature", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_auto_is_bf16_where_the_processor_has_it(monkeypatch, feature):
    from device import open_device

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True, "avx2": True})
    assert open_device("cpu", "auto")[1] == ("bf16" if feature else "fp32")


def test_result_agrees_with_predictions(cli):
    cli("--finetune", *LEARNS, dataset="ag_news")
    (run,) = cli.runs.iterdir()
    rows, test = read_lines(run / "predictions.jsonl"), read_json(run / "result.json")["test"]
    labels, predicted = [row["label"] for row in rows], [row["prediction"] for row in rows]
    assert set(labels) == {"World", "Sports", "Business", "Sci/Tech"}
    assert test["accuracy"] == accuracy_score(labels, predicted)
    macro = precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)[:3]
    np.testing.assert_allclose([test[key] for key in ("precision", "recall", "f1")], macro)
    chosen = [row["probabilities"][row["label"]] for row in rows]
    assert test["loss"] == pytest.approx(-np.log(chosen).mean())
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["probability"] == max(row["probabilities"].values()) == row["probabilities"][row["prediction"]]
    for metric in ("accuracy", "precision", "recall", "f1"):
        low, high = test[f"{metric}_interval"]
        assert low <= test[metric] <= high


@pytest.mark.parametrize("method", [("--finetune", *BRIEF), ("--finetune", "--peft", *BRIEF), ("--baseline",)])
def test_the_same_command_twice_gives_the_same_numbers(cli, method):
    for _ in range(2):
        assert cli(*method)[0] == 0
    first, second = sorted(cli.runs.iterdir())
    assert second.name == first.name + "-2"
    for name in ("metrics.jsonl", "predictions.jsonl"):
        one, two = read_lines(first / name), read_lines(second / name)
        for line in one + two:
            line.pop("time", None), line.pop("train/samples_per_second", None)
        assert one == two
    for file in (first / "model").glob("*.safetensors"):
        assert file.read_bytes() == (second / "model" / file.name).read_bytes()


def test_another_seed_gives_other_numbers(cli):
    cli("--finetune", "--epochs", "1", "--seed", "1")
    cli("--finetune", "--epochs", "1", "--seed", "2")
    one, two = (read_lines(run / "metrics.jsonl")[0]["train/loss"] for run in sorted(cli.runs.iterdir()))
    assert one != two


@pytest.fixture
def no_dropout(tiny_model, tmp_path):
    """The tiny model without dropout, so that splitting a batch changes nothing."""

    folder = tmp_path / "no-dropout"
    shutil.copytree(tiny_model, folder)
    config = (folder / "config.json").read_text()
    for key in ('"dropout": 0.1', '"attention_dropout": 0.1', '"seq_classif_dropout": 0.2'):
        assert key in config
        config = config.replace(key, key.split(":")[0] + ": 0.0")
    (folder / "config.json").write_text(config)
    return folder


@pytest.mark.parametrize("plain", [True, False])
def test_a_step_is_the_mean_over_its_examples(no_dropout, tiny_data, plain):
    """Passes of 4, 4 and 2 rows give the gradient of one pass over the 10: no average of averages."""
    from data import load_data
    from device import open_device
    from engine import make_engine
    from models import find_model, load_classifier, load_tokenizer
    from tokens import Cutter, tokenize
    from tracking import NullLogger

    accelerator, _ = open_device("cpu", "fp32")
    source = find_model(str(no_dropout))
    tokenizer, _ = load_tokenizer(source, None)
    data = load_data(str(tiny_data / "rotten_tomatoes"), None, None, 0)
    splits, _ = tokenize(data, Cutter(tokenizer, 64))
    gradients = []
    for passes in ([np.arange(10)], [np.arange(4), np.arange(4, 8), np.arange(8, 10)]):
        torch.manual_seed(0)
        model = load_classifier(source, data.label_names)
        settings = {"precision": "fp32", "lr": 1.0, "weight_decay": 0.0, "max_grad_norm": 0.0}
        engine = make_engine(model, accelerator, **settings, plain=plain)
        assert engine.name.startswith("plain" if plain else "fast")

        def record(engine=engine) -> None:
            found = {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}
            if engine.name.startswith("fast"):  # its embedding rows have their gradient elsewhere
                rows, grad = engine.optimizer._table_grad()
                table = torch.zeros_like(engine.classifier.table)
                found["distilbert.embeddings.word_embeddings.weight"] = table.index_copy_(0, rows, grad)
            gradients.append(found)

        engine.step, engine.stepped = record, lambda: True
        schedule = train.linear_schedule(engine.optimizer, 0.0, 1)
        loader = lambda epoch, passes=passes: iter([passes])  # noqa: E731
        train.train(
            engine, schedule, loader, splits, accelerator, NullLogger(), train.Progress(), epochs=1, steps_per_epoch=1
        )
    assert len(gradients[0]) == len(list(model.parameters()))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("plain", [True, False])
def test_decay_spares_every_one_dimensional_parameter(tiny_model, plain):
    from device import open_device
    from engine import make_engine
    from models import find_model, load_classifier

    model = load_classifier(find_model(str(tiny_model)), ("a", "b"))
    settings = {"precision": "fp32", "lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}
    engine = make_engine(model, open_device("cpu", "fp32")[0], **settings, plain=plain)
    decayed, spared = engine.optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    ids = {id(p) for p in spared["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in ids}
    assert {name for name, _ in model.named_parameters() if "layer_norm" in name or name.endswith("bias")} <= names
    assert not any(name.endswith(("lin.weight", "embeddings.weight", "classifier.weight")) for name in names)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_the_rate_rises_then_falls_to_zero(cli):
    cli("--finetune", "--epochs", "5", "--batch_size", "4", "--lr", "1e-3", "--warmup_ratio", "0.25")
    (run,) = cli.runs.iterdir()
    rates = {line["step"]: line["train/lr"] for line in read_lines(run / "metrics.jsonl") if "train/lr" in line}
    total, warm = 120, 30
    for step, rate in rates.items():
        done = step - 1  # the rate that this step was taken with
        expected = done / warm if done < warm else (total - done) / (total - warm)
        assert math.isclose(rate, 1e-3 * expected, rel_tol=1e-9), step


def test_lora_leaves_the_encoder_bitwise_alone(cli, tiny_model):
    cli("--finetune", "--peft", "--lora_r", "2", *LEARNS)
    (run,) = cli.runs.iterdir()
    saved = load_file(run / "model" / "adapter_model.safetensors")
    sites = {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}
    assert {name.split(".")[-3] for name in saved if "lora_A" in name} == sites
    assert {name.split(".")[-2] for name in saved if "lora" not in name} == {"pre_classifier", "classifier"}
    assert sum("lora_A" in name for name in saved) == 2 * len(sites)
    assert not any(torch.equal(weight, torch.zeros_like(weight)) for weight in saved.values())

    from peft import AutoPeftModelForSequenceClassification

    model = AutoPeftModelForSequenceClassification.from_pretrained(run / "model", num_labels=2)
    base = load_file(tiny_model / "model.safetensors")
    compared = 0
    for name, weight in model.named_parameters():
        if "distilbert" in name and "lora" not in name:
            original = base[name.removeprefix("base_model.model.").replace(".base_layer", "")]
            assert torch.equal(weight, original), name
            compared += 1
    assert compared == sum(name.startswith("distilbert.") for name in base)


def test_trainable_parameters_are_counted(cli):
    for words in ((), ("--peft", "--lora_r", "3")):
        cli("--finetune", "--epochs", "1", *words)
    full, lora = (read_json(cli.runs / name / "result.json") for name in sorted(p.name for p in cli.runs.iterdir()))
    head = 16 * 16 + 16 + 16 * 2 + 2
    adapters = 2 * 3 * (4 * (16 + 16) + 2 * (16 + 32))
    assert lora["trainable_parameters"] == adapters + head
    assert full["trainable_parameters"] == full["total_parameters"] == lora["total_parameters"] - adapters


@pytest.mark.parametrize("method", [(), ("--peft", "--lora_r", "4", "--lora_alpha", "64")])
def test_the_saved_model_gives_the_recorded_probabilities(cli, method):
    """transformers.pipeline on RUN/model, on the run's own test rows, in fp32, with the names of four classes."""
    from transformers import pipeline

    assert cli("--finetune", *LEARNS, *method, "--precision", "fp32", dataset="ag_news")[0] == 0
    (run,) = cli.runs.iterdir()
    if method:
        assert read_json(run / "model" / "adapter_config.json")["lora_alpha"] == 64
    rows = read_lines(run / "predictions.jsonl")
    classify = pipeline("text-classification", model=str(run / "model"), top_k=None)
    for row, scores in zip(rows, classify([row["text"] for row in rows]), strict=True):
        got = {score["label"]: score["score"] for score in scores}
        assert got == pytest.approx(row["probabilities"], abs=1e-5)


def test_ctrl_c_ends_with_130_and_no_traceback(cli, monkeypatch):

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "validate", interrupt)
    code, _, err = cli("--finetune", "--epochs", "1")
    assert code == 130 and "Traceback" not in err


@pytest.mark.parametrize("stopped", [True, False])
def test_ctrl_c_while_the_trackers_close_changes_nothing(cli, monkeypatch, stopped):
    """A run that was stopped says how to go on, one that was done is done."""
    count = train.Progress.count

    def counting(self, *facts) -> None:
        count(self, *facts)
        if stopped and self.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def close(self, status: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Progress, "count", counting)
    monkeypatch.setattr(tracking.RunLogger, "close", close)
    code, _, err = cli("--finetune", "--epochs", "1")
    (run,) = cli.runs.iterdir()
    assert code == (130 if stopped else 0) and (run / "result.json").exists() == (not stopped)
    assert err.splitlines()[-1].endswith(f"--resume {run}") == stopped


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 0.9), (1.0, 0.8), (1.0, 0.2), (1.0, 0.3)], 3),  # a tie goes to the lower loss
        ([(0.5, 0.1), (0.6, 0.9)], 2),  # accuracy comes first
        ([(0.5, 0.4), (0.5, 0.4)], 1),  # then the earlier epoch
        ([(0.5, math.nan), (0.4, 0.1)], 1),
    ],
)
def test_the_best_epoch_is_the_most_accurate_then_that_of_the_lowest_loss(monkeypatch, scores, best):
    from types import SimpleNamespace

    rows = iter(scores)
    monkeypatch.setattr(train, "score", lambda *_: dict(zip(("accuracy", "loss"), next(rows))))
    monkeypatch.setattr(train, "predict_probabilities", lambda *_: None)
    progress, split = train.Progress(), SimpleNamespace(labels=None)
    for epoch in range(1, len(scores) + 1):
        engine = SimpleNamespace(model=torch.nn.Linear(1, 1))
        train.validate(engine, split, None, tracking.NullLogger(), epoch, progress)
    assert (progress.best_epoch, progress.best_accuracy) == (best, scores[best - 1][0])


def test_few_validation_rows_are_said_at_the_start(cli, tiny_model, tmp_path):
    for rows, warned in ((20, 1), (200, 0)):  # of each class: a tenth is held out
        file = tmp_path / f"{rows}.csv"
        file.write_text("text,label\n" + "".join(f"{w} film {n},{w}\n" for n in range(rows) for w in ("good", "bad")))
        where = ("--dataset", str(file), "--model", str(tiny_model))
        code, _, err = cli("--finetune", "--epochs", "1", "--limit", "32", *where, dataset=None)
        assert code == 0 and err.count("warning: validation has 4 rows: too few to choose well by") == warned, err
        assert err.count("warning: validation") == warned


def test_a_model_that_gives_one_answer_is_said_at_the_end(cli):
    code, _, err = cli("--finetune", "--epochs", "1", "--lr", "50", "--max_grad_norm", "0")
    assert code == 0 and re.match(
        r"warning: the model calls every validation row '(neg|pos)'; try", err.splitlines()[-1]
    )
    assert "calls every" not in cli("--finetune", *LEARNS)[2]
