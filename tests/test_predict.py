"""--predict and --merge, through the real command line, on runs of the tiny model."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, read_json, read_lines
from safetensors.numpy import load_file

import models
from fast import FastClassifier
from main import main
from predict import Predictor, open_saved

METHODS = {
    "full": ("--finetune", "--epochs", "2", "--lr", "1e-2"),
    "lora": ("--finetune", "--epochs", "2", "--peft", "--lora_r", "4", "--lr", "5e-3"),
    "baseline": ("--baseline", "--max_length", "8", "--truncation", "head_tail"),  # most texts are longer
}
TEXTS = ["great moving story", "", "awful and dull", "the film was funny , warm", "   ", "é漢🎬 bad"]


@pytest.fixture(scope="session")
def runs(tiny_model, tiny_data, tmp_path_factory) -> dict[str, Path]:
    """A finished run of every method, in fp32."""
    found = {}
    for name, words in METHODS.items():
        folder = tmp_path_factory.mktemp(name)
        where = ("--dataset", str(tiny_data / "rotten_tomatoes"), "--model", str(tiny_model))
        assert main([*words, *where, "--precision", "fp32", "--output_dir", str(folder)]) == 0
        (found[name],) = folder.iterdir()
    return found


@pytest.fixture
def predict(capsys, monkeypatch):
    """predict(run, *words, stdin=...) -> (exit code, stdout, stderr)"""

    def call(run: Path, *words: str, stdin: str | None = None) -> tuple[int, str, str]:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            if stdin is not None:
                patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            try:
                code = main(["--precision", "fp32", "--predict", str(run), *words])
            except SystemExit as stop:
                code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def shell(line: str) -> subprocess.CompletedProcess:
    return subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, timeout=60, check=False)


def lines(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def stir(model: torch.nn.Module, part: str) -> None:
    torch.manual_seed(len(part))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.mark.parametrize("close", [0, 100], ids=["as they come", "again in fp32"])
@pytest.mark.parametrize("part", ["distilbert.transformer", "classifier"])
def test_weights_that_are_read_again_are_the_ones_computed_with(runs, close: float, part: str, monkeypatch):
    """In bf16 and fp32 a forward pass has copies of its own; experiments/average.py changes weights."""
    monkeypatch.setattr("predict.CLOSE", close)
    one, other = (Predictor(open_saved(str(runs["full"]), "predict"), "cpu", "bf16") for _ in range(2))
    texts = [text for text in TEXTS if text.strip()]
    for predictor in (one, other):  # away from near-zero weights, which nothing depends on
        stir(predictor.model, "")
    one.read_weights()
    before = one(texts)
    for predictor in (one, other):
        stir(predictor.model, part)
    one.read_weights()
    fresh = FastClassifier(other.model, "fp32")
    ids, _ = one.cutter(texts)
    expected = [fresh(torch.tensor([row]), torch.tensor([len(row)])).softmax(1)[0].tolist() for row in ids]
    assert np.abs(expected - before).max() > 0.05
    assert one(texts) == pytest.approx(np.array(expected), abs=1e-5 if close else 0.03)


@pytest.mark.parametrize("method", METHODS)
def test_it_gives_the_probabilities_that_the_run_recorded(runs, predict, tmp_path, method):
    rows = read_lines(runs[method] / "predictions.jsonl")
    file = tmp_path / "test.txt"
    file.write_text("".join(row["text"] + "\n" for row in rows))
    code, out, err = predict(runs[method], "--input", str(file))
    assert code == 0, err
    got = lines(out)
    assert [row["text"] for row in got] == [row["text"] for row in rows]
    assert [row["label"] for row in got] == [row["prediction"] for row in rows]
    for mine, row in zip(got, rows, strict=True):
        assert mine["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)


def test_texts_lines_and_files_are_answered_alike_and_in_order(runs, predict, tmp_path, monkeypatch):
    """Windows of two rows, so that order and blanks are kept across them."""
    import streams

    monkeypatch.setattr(streams, "WINDOW_ROWS", 2)
    monkeypatch.setattr(streams._windows, "__defaults__", (2,))
    one_by_one = [lines(predict(runs["full"], text)[1])[0] for text in TEXTS]
    assert [row["label"] is None for row in one_by_one] == [not text.strip() for text in TEXTS]
    assert lines(predict(runs["full"], *TEXTS)[1]) == one_by_one
    stream = "".join(text + "\n" for text in TEXTS)
    for given in (stream, stream.removesuffix("\n"), stream.replace("\n", "\r\n"), "\ufeff" + stream):
        assert lines(predict(runs["full"], stdin=given)[1]) == one_by_one
    file = tmp_path / "texts.txt"
    file.write_text(stream)
    assert predict(runs["full"], "--input", str(file), "--output", str(tmp_path / "out.jsonl"))[1] == ""
    assert read_lines(tmp_path / "out.jsonl") == one_by_one


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_files_keep_their_columns_and_gain_more(runs, predict, tmp_path, ending):
    file, out = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    numbers = list(range(len(TEXTS)))
    if ending == "parquet":
        pq.write_table(pa.table({"id": numbers, "text": TEXTS, "label": ["x"] * len(TEXTS)}), file)
    elif ending == "jsonl":
        file.write_text("".join(json.dumps({"id": n, "text": t, "label": "x"}) + "\n" for n, t in enumerate(TEXTS)))
    else:
        with file.open("w", newline="") as handle:
            writer = csv.writer(handle, delimiter="\t" if ending == "tsv" else ",")
            writer.writerows([["id", "text", "label"], *([n, t, "x"] for n, t in enumerate(TEXTS))])
    assert predict(runs["full"], "--input", str(file), "--output", str(out))[0] == 0
    expected = lines(predict(runs["full"], *TEXTS)[1])
    if ending == "jsonl":
        got = read_lines(out)
        shares = [row["probabilities"] and row["probabilities"]["pos"] for row in got]
    else:
        if ending == "parquet":
            got = pq.read_table(out).to_pylist()
        else:
            with out.open(newline="") as handle:
                got = list(csv.DictReader(handle, delimiter="\t" if ending == "tsv" else ","))
        assert list(got[0]) == ["id", "text", "label", "predicted_label", "probability_neg", "probability_pos"]
        shares = [row["probability_pos"] for row in got]
    assert [(int(row["id"]), row["text"], row["label"]) for row in got] == [(n, t, "x") for n, t in enumerate(TEXTS)]
    assert [row["predicted_label"] or None for row in got] == [row["label"] for row in expected]
    wanted = [row["probabilities"] and row["probabilities"]["pos"] for row in expected]
    assert [None if share in ("", None) else float(share) for share in shares] == wanted
    said = predict(runs["full"], "--input", str(file))[1]  # to standard output: JSON lines, whatever the input
    assert [row["predicted_label"] for row in lines(said)] == [row["label"] for row in expected]


def test_empty_lines_of_a_csv_stay_where_they_are(runs, predict, tmp_path):
    (tmp_path / "in.csv").write_text("text,n\n\ngood,1\n\n\nbad,2\n")
    assert predict(runs["full"], "--input", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.csv"))[0] == 0
    got = (tmp_path / "out.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in got] == ["text", "", "good", "", "", "bad"]


def test_the_column_of_the_training_rows_is_found_again(runs, predict, tmp_path):
    """Though the file has another that is looked for first, and some rows lack it."""
    shutil.copytree(runs["full"], run := tmp_path / "run")
    record = read_json(run / "config.json")
    assert record["data"]["text_column"] == "text"
    record["data"]["text_column"] = "review"
    (run / "config.json").write_text(json.dumps(record))
    rows = [{"id": 1, "text": "header"}, {"id": 2, "text": "meta", "review": "great moving"}, {"review": "dull"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "in.csv").write_text("text,review\nheader,\nmeta,great moving\n,dull\n")
    expected = lines(predict(runs["full"], "great moving", "dull")[1])
    for name in ("in.jsonl", "in.csv"):
        code, out, err = predict(run, "--input", str(tmp_path / name))
        assert code == 0, err
        assert [row["probabilities"] for row in lines(out)] == [None, *(row["probabilities"] for row in expected)]


def test_the_column_can_be_named(runs, predict, tmp_path):
    (tmp_path / "in.csv").write_text("text,words\n1,great moving\n2,dull\n")
    words = ("--input", str(tmp_path / "in.csv"), "--text_column", "words")
    expected = lines(predict(runs["full"], "great moving", "dull")[1])
    got = lines(predict(runs["full"], *words)[1])
    assert [row["probabilities"] for row in got] == [row["probabilities"] for row in expected]


WRONG = {
    "no such run": ("nowhere", (), None, "run folder"),
    "not a run": (".", (), None, "run folder"),
    "no such file": (None, ("--input", "nowhere.csv"), None, "nowhere.csv: cannot be read"),
    "no such parquet": (None, ("--input", "nowhere.parquet"), None, "nowhere.parquet"),
    "unknown ending": (None, ("--input", "texts.xlsx"), None, ".csv"),
    "empty input": (None, (), "", "empty file"),
    "both": (None, ("good", "--input", "x.csv"), None, "texts or --input"),
    "not UTF-8": (None, ("--input", "{latin}"), None, "0xe9; convert it, such as by iconv -f latin1"),
    "empty file": (None, ("--input", "{empty}"), None, "empty file"),
    "missing column": (None, ("--input", "{csv}"), None, "line 1 (taken as the header): expected a column text"),
    "missing named column": (None, ("--input", "{csv}", "--text_column", "nope"), None, "'nope'"),
    "other ending": (None, ("--input", "{csv}", "--text_column", "a", "--output", "x.parquet"), None, "or .csv (JSON"),
    "onto itself": (None, ("--input", "{csv}", "--text_column", "a", "--output", "{csv}"), None, "another file"),
    "no folder": (None, ("good", "--output", "nowhere/x.jsonl"), None, "nowhere"),
    "taken names": (None, ("--input", "{taken}"), None, "predicted_label"),
    "a blank for a run": (" ", (), None, "expected a name or a path"),
    "a header alone": (None, ("--input", "{header}", "--output", "x.csv"), None, "expected rows of text, found none"),
    "an empty list": (None, ("--input", "{list}", "--output", "x.jsonl"), None, "expected rows of text, found none"),
    "a column that no row has": (None, ("--input", "{rows}", "--text_column", "nope"), None, "the column 'nope'"),
    "the model's folder": ("{run}/model", (), None, "expected the run's folder"),
    "two columns of a name": (None, ("--input", "{twice}"), None, "expected columns of different names"),
    "half a pair": (None, ("--input", "{half}"), None, "line 1: expected a text under 'text'"),
    "an argument that is not UTF-8": (None, ("caf\udce9",), None, "expected texts in UTF-8"),
}
ENDINGS = {"rows": "jsonl", "twice": "parquet", "latin": "txt", "empty": "txt", "half": "jsonl", "list": "json"}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_user_got_wrong_is_one_line(runs, predict, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    files = {"latin": b"good\ncaf\xe9\n", "empty": b"", "csv": b"a,b\n1,2\n", "taken": b"text,predicted_label\na,b\n"}
    files |= {"rows": b'{"text": "good"}\n' * 5000}
    files |= {"header": b"text,b\n", "list": b"[]", "half": b'{"text": "\\ud800"}\n'}
    twice = io.BytesIO()
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), twice)
    files["twice"] = twice.getvalue()
    paths = {name: f"{name}.{ENDINGS.get(name, 'csv')}" for name in files}
    for name, content in files.items():
        (tmp_path / paths[name]).write_bytes(content)
    run, words, stdin, expected = WRONG[case]
    run = run.format(run=runs["full"]) if run else runs["full"]
    code, out, err = predict(run, *(word.format(**paths) for word in words), stdin=stdin)
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and expected in last and "Traceback" not in err
    assert out == "" and not list(tmp_path.glob("x.*"))
    assert (tmp_path / "csv.csv").read_bytes() == files["csv"]


def test_a_text_with_a_carriage_return_stays_one_row(runs, predict, tmp_path):
    (tmp_path / "in.csv").write_bytes(b'"i\rd",text\n1,"good\rfilm"\n2,bad\n')
    words = ("--input", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.csv"))
    assert predict(runs["full"], *words)[0] == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[:2] for row in rows] == [["i\rd", "text"], ["1", "good\rfilm"], ["2", "bad"]]
    assert len({len(row) for row in rows}) == 1


def test_an_adapter_is_no_model_to_start_from(runs, cli):
    """transformers would put it on and freeze the rest; merged weights are one."""
    for words in (("--finetune",), ("--finetune", "--peft"), ("--baseline",)):
        code, _, err = cli(*words, "--model", str(runs["lora"] / "model"))
        assert code == 2 and "--merge RUN" in err.splitlines()[-1] and not cli.runs.exists()


@pytest.mark.parametrize(
    "damage",
    [{"config": None}, {"config": []}, {"max_length": "many"}, {"max_length": 10**6}, {"data": {}}, {"method": None}],
)
def test_a_record_that_says_nonsense_is_one_line(runs, predict, tmp_path, damage):
    run = shutil.copytree(runs["full"], tmp_path / "run")
    record = read_json(run / "config.json") | damage
    (run / "config.json").write_text(json.dumps(record))
    code, _, err = predict(run, "good")
    assert code == 2 and err.startswith("error: --predict") and str(run) in err and len(err.splitlines()) == 1


def test_a_head_is_kept_for_the_classes_it_was_trained_on_alone(runs, cli, tmp_path):
    """The same names, in any case: training goes on. Others, or another number: a new last layer, and it is said."""
    base = runs["full"] / "model"

    def head(run: Path) -> np.ndarray:
        return load_file(run / "model" / "model.safetensors")["classifier.weight"]

    def start(names: dict[str, str], dataset: str = "rotten_tomatoes") -> tuple[np.ndarray, str]:
        folder = shutil.copytree(base, tmp_path / "model", dirs_exist_ok=True)
        config = read_json(folder / "config.json")
        config["id2label"] = {str(n): names.get(name, name) for n, name in enumerate(config["id2label"].values())}
        config["label2id"] = {name: int(n) for n, name in config["id2label"].items()}
        (folder / "config.json").write_text(json.dumps(config))
        words = ("--epochs", "1", "--lr", "1e-12", "--model", str(folder))
        code, _, err = cli("--finetune", *words, dataset=dataset)
        assert code == 0, err
        run = max(cli.runs.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return head(run), err

    was = head(runs["full"])
    kept, said = start({"neg": "NEG"})
    assert np.allclose(kept, was, atol=1e-6) and "head" not in said
    unnamed, said = start({"neg": "LABEL_0", "pos": "LABEL_1"})
    assert np.allclose(unnamed, was, atol=1e-6) and "have no names" in said
    fresh, said = start({"neg": "bad", "pos": "good"})
    assert np.abs(fresh - was).max() > 0.01 and "other classes (bad, good)" in said
    more, said = start({}, "ag_news")
    assert len(more) == 4 and "other classes (neg, pos)" in said


def test_two_merges_at_once_give_one_result(runs, capsys, monkeypatch, tmp_path):
    run = shutil.copytree(runs["lora"], tmp_path / "run", ignore=shutil.ignore_patterns("merged"))
    save = models.save_model

    def save_as_another_has(*words) -> None:
        save(*words)
        if not (run / "merged").exists():
            shutil.copytree(words[2], run / "merged")

    monkeypatch.setattr(models, "save_model", save_as_another_has)
    assert main(["--merge", str(run)]) == 0 and (run / "merged" / "model.safetensors").exists()
    assert sorted(path.name for path in run.glob(".merged*")) == []


def test_json_lines_have_no_nan(runs, predict, tmp_path):
    pq.write_table(
        pa.table({"text": ["good"], "x": [float("nan")], "more": [[1.0, float("inf")]]}), tmp_path / "f.parquet"
    )
    code, out, _ = predict(runs["full"], "--input", str(tmp_path / "f.parquet"))
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and found["x"] is None and found["more"] == [1.0, None] and found["predicted_label"]


def test_text_of_every_kind_that_parquet_has(runs, predict, tmp_path):
    texts = pa.array(["good", "bad"])
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())):
        pq.write_table(pa.table({"text": texts.cast(kind)}), tmp_path / "f.parquet")
        code, out, err = predict(runs["full"], "--input", str(tmp_path / "f.parquet"))
        assert code == 0 and [row["text"] for row in lines(out)] == ["good", "bad"], err


def test_half_a_pair_beside_the_text_stays_as_it_is(runs, predict, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "good", "id": "\\ud800"}\n')
    words = ("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    assert predict(runs["full"], *words)[0] == 0
    assert read_lines(tmp_path / "out.jsonl")[0]["id"] == "\ud800"


def test_an_unfinished_run_and_a_damaged_one_are_refused(runs, predict, tmp_path):
    for name, reason in {
        "model/adapter_model.safetensors": "adapter_model.safetensors",
        "model/tokenizer.json": "its tokenizer files (tokenizer.json)",
        "model/model.safetensors": "its model folder lacks model.safetensors",
        "result.json": "not finished; go on with it",
    }.items():
        run = shutil.copytree(runs["lora"], tmp_path / name.replace("/", "-"))
        (run / name).unlink()
        code, _, err = predict(run, "good")
        last = err.strip().splitlines()[-1]
        assert code == 2 and last.startswith(f"error: --predict {run}: ") and reason in last, err
        assert "Traceback" not in err


def test_rows_that_bf16_leaves_open_are_computed_in_fp32(runs, monkeypatch):
    """With every row taken for open, bf16 gives the numbers of fp32; with none, others."""
    import predict as module

    saved = module.open_saved(str(runs["full"]), "predict")
    texts = [row["text"] for row in read_lines(runs["full"] / "predictions.jsonl")]
    exact = module.Predictor(saved, "cpu", "fp32")(texts)
    found = {}
    for limit in (0.0, 1e9):
        monkeypatch.setattr(module, "CLOSE", limit)
        found[limit] = module.Predictor(saved, "cpu", "bf16")(texts)
    assert np.array_equal(found[1e9], exact) and not np.array_equal(found[0.0], exact)
    np.testing.assert_allclose(found[0.0], exact, atol=0.02)


def test_merged_weights_are_plain_and_agree(runs, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert main(["--merge", str(runs["lora"])]) == 0
    folder = runs["lora"] / "merged"
    assert str(folder) in capsys.readouterr().out and not (folder / "adapter_config.json").exists()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    import torch

    for row in read_lines(runs["lora"] / "predictions.jsonl"):
        with torch.no_grad():
            shares = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(dim=-1)[0].tolist()
        named = dict(zip((model.config.id2label[n] for n in range(2)), shares))
        assert named == pytest.approx(row["probabilities"], abs=1e-5)
    assert main(["--merge", str(runs["lora"])]) == 0  # it is there already
    assert main(["--merge", str(runs["full"])]) == 2
    assert "expected a LoRA run" in capsys.readouterr().err


def test_a_lora_run_loads_in_peft_with_its_head(runs):
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    model = AutoPeftModelForSequenceClassification.from_pretrained(runs["lora"] / "model", num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(runs["lora"] / "model")
    for row in read_lines(runs["lora"] / "predictions.jsonl")[:9]:
        with torch.no_grad():
            shares = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(dim=-1)[0].tolist()
        assert shares == pytest.approx(list(row["probabilities"].values()), abs=1e-5)


def test_ctrl_c_leaves_whole_lines(runs, tmp_path):
    """The real process, fed without end, stopped in the middle."""
    out = tmp_path / "out.jsonl"
    words = [sys.executable, str(ROOT / "main.py"), "--predict", str(runs["full"]), "--output", str(out)]
    feeder = subprocess.Popen(["/usr/bin/env", "yes", "great film"], stdout=subprocess.PIPE)
    process = subprocess.Popen(words, stdin=feeder.stdout, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        feeder.kill(), feeder.wait(), process.kill()
    assert process.returncode == 130 and "Traceback" not in err, err
    content = out.read_text()
    assert content.endswith("\n") and all(json.loads(line)["label"] for line in content.splitlines())


def test_who_reads_may_go(runs):
    line = f"yes great | {sys.executable} {ROOT / 'main.py'} --predict {runs['full']} | head -2"
    done = shell(line)
    assert len(done.stdout.splitlines()) == 2 and done.stderr == ""


def test_closed_standard_input_is_one_line(runs):
    line = f"{sys.executable} {ROOT / 'main.py'} --predict {runs['full']} <&-"
    done = shell(line)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_closed_standard_output_is_one_line(runs):
    done = shell(f"{sys.executable} {ROOT / 'main.py'} --predict {runs['full']} good >&-")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_long_pipe_needs_no_more_memory_than_a_short_one(runs, tmp_path):
    """The short one comes first in the same process: what it frees is there for as many rows of the long one."""
    code = f"""import resource, main
for name in ("short", "long"):
    assert main.main(["--predict", {str(runs["full"])!r}, "--input", name + ".txt", "--output", name + ".jsonl"]) == 0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    sizes = {"short": 10_000, "long": 60_000}
    for name, rows in sizes.items():
        (tmp_path / f"{name}.txt").write_text("a rather good film with a story\n" * rows)
    words, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    peaks = [int(line) for line in done.stdout.splitlines()]
    for name, rows in sizes.items():
        assert sum(1 for _ in (tmp_path / f"{name}.jsonl").open()) == rows
    assert peaks[1] - peaks[0] < 30_000  # kB


def test_the_card_names_base_data_and_limits(runs):
    card = (runs["full"] / "model" / "README.md").read_text()
    record = read_json(runs["full"] / "result.json")
    assert record["model"]["source"] in card and record["data"]["source"] in card and "95%" in card
    assert "its card names none" in card and "license:" not in card.split("---")[1]  # the tiny model has no card
    assert "pipeline_tag: text-classification" in card and "Best epoch" in card


def test_the_card_of_a_baseline_promises_no_head(runs):
    card = (runs["baseline"] / "model" / "README.md").read_text()
    assert "pipeline_tag" not in card and "epoch" not in card and "linear.safetensors" in card
    assert "another seed" not in card and "Precision, recall and F1 are those of 'pos'" in card
    assert f"C by validation accuracy: {read_json(runs['baseline'] / 'result.json')['C']:g}." in card


def test_the_license_is_what_the_head_of_a_card_names(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Mine\n")
    assert models.find_model(str(folder)).license == "mit"
    for card in ("# license: none\n", "---\nlanguage: en\n---\nIts rows have the\nlicense: cc-by-nc-4.0\n"):
        (folder / "README.md").write_text(card)
        assert models.find_model(str(folder)).license is None


def test_the_column_that_the_run_was_trained_on_is_the_first_guess(runs, predict, tmp_path):
    run = shutil.copytree(runs["full"], tmp_path / "run")
    record = read_json(run / "config.json")
    record["config"]["text_column"] = "words"
    (run / "config.json").write_text(json.dumps(record))
    (tmp_path / "in.csv").write_text("text,words\n1,great moving\n")
    (tmp_path / "in.jsonl").write_text('{"text": "1", "words": "great moving"}\n')
    pq.write_table(pa.table({"text": ["1"], "words": ["great moving"]}), tmp_path / "in.parquet")
    (tmp_path / "other.csv").write_text("text\ngreat moving\n")
    (expected,) = lines(predict(run, "great moving")[1])
    for name in ("in.csv", "in.jsonl", "in.parquet", "other.csv"):
        (got,) = lines(predict(run, "--input", str(tmp_path / name))[1])
        assert got["probabilities"] == expected["probabilities"], name
    (got,) = lines(predict(run, "--input", str(tmp_path / "in.csv"), "--text_column", "text")[1])
    assert got["probabilities"] != expected["probabilities"]


def test_a_damaged_run_is_refused_by_the_name_of_the_damaged_file(runs, predict, tmp_path, capsys):
    for number, name in enumerate(("model/adapter_model.safetensors", "model/model.safetensors", "config.json")):
        run = shutil.copytree(runs["lora"], tmp_path / str(number), ignore=shutil.ignore_patterns("merged"))
        (run / name).write_bytes((run / name).read_bytes()[:100])
        for code, err in (predict(run, "good")[::2], (main(["--merge", str(run)]), capsys.readouterr().err)):
            line = err.strip().splitlines()[-1]
            assert code == 2 and f"{Path(name).name} is damaged" in line and str(run) in line, line


def test_an_output_that_is_there_is_written_over_and_said_to_be(runs, predict, tmp_path):
    words = ("good", "--output", str(tmp_path / "out.jsonl"))
    assert "written over" not in predict(runs["full"], *words)[2]
    code, _, err = predict(runs["full"], *words)
    assert code == 0 and f"warning: --output {words[-1]} exists and is written over" in err.splitlines()
