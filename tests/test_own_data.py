"""The user's own files: named columns, long texts, imbalanced classes, files of many rows."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, read_json, read_lines

from config import UserError
from data import load_data
from readers import Columns

ROWS = [("great film story", "pos"), ("dull film story", "neg")]


def table(rows: int, header: str = "text,label") -> str:
    return header + "\n" + "".join(f"{text} {n},{label}\n" for n in range(rows // 2) for text, label in ROWS)


def test_columns_can_be_named_whatever_else_is_there(cli, tmp_path):
    file = tmp_path / "mine.csv"
    lines = [f"{text} {n},nonsense,{label},x" for n in range(40) for text, label in ROWS]
    file.write_text("Kommentar,text,Urteil,label\n" + "\n".join(lines))
    named = ("--text_column", "Kommentar", "--label_column", "Urteil")
    assert cli("--baseline", "--dataset", str(file), *named, dataset=None)[0] == 0
    (run,) = cli.runs.iterdir()
    assert read_json(run / "config.json")["data"]["labels"] == ["neg", "pos"]
    assert all("film story" in row["text"] for row in read_lines(run / "predictions.jsonl"))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_a_column_that_is_not_there_is_one_line(tmp_path, ending):
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / f"mine.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", "y"]}), file)
    elif ending == "jsonl":
        file.write_text(json.dumps({"text": "a", "label": "x"}) + "\n")
    else:
        file.write_text(table(10).replace(",", "\t" if ending == "tsv" else ","))
    for columns in (Columns("nope", None), Columns(None, "nope"), Columns("text", "text")):
        with pytest.raises(UserError, match=r"nope|for both") as refused:
            load_data(str(file), None, None, 0, columns)
        assert str(file) in str(refused.value)


LONG = " ".join(["great film"] * 40)


@pytest.mark.parametrize("truncation", ["head", "head_tail"])
def test_long_texts_are_cut_and_counted(cli, tiny_model, tmp_path, truncation):
    """The ids kept are those of the tokenizer: the first ones, or a quarter first and the rest last."""
    from transformers import AutoTokenizer

    from tokens import Cutter

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    words = "the a this film movie story plot is was and with of".split()
    text = " ".join(words)
    whole = tokenizer(text)["input_ids"]
    (cut, short), number = Cutter(tokenizer, 10, truncation)([text, "a film"])
    assert number == 1 and short == tokenizer("a film")["input_ids"]
    inner = whole[1:-1]
    kept = inner[:8] if truncation == "head" else inner[:2] + inner[-6:]
    assert cut == [whole[0], *kept, whole[-1]]

    file = tmp_path / "mine.csv"
    file.write_text(table(80) + "".join(f"{LONG} {n},{label}\n" for n in range(10) for _, label in ROWS))
    words = ("--max_length", "12", "--truncation", truncation, "--epochs", "1")
    code, _, err = cli("--finetune", "--dataset", str(file), *words, dataset=None)
    assert code == 0, err
    assert "warning: train: " in err and "longer than 12 tokens and were cut" in err
    (run,) = cli.runs.iterdir()
    assert any("were cut" in note for note in read_json(run / "config.json")["data"]["notes"])


def test_balanced_classes_count_the_same_in_the_loss(cli, tmp_path, monkeypatch):
    import torch

    import train

    file = tmp_path / "mine.csv"
    lines = [f"film {n},{'rare' if n % 8 == 0 else 'often'}" for n in range(160)]
    file.write_text("text,label\n" + "\n".join(lines))
    seen = []

    def balanced(job):
        seen.append((np.bincount(job.splits["train"].labels), weights(job)))
        return seen[-1][1]

    weights = train.balanced_weights
    monkeypatch.setattr(train, "balanced_weights", balanced)
    words = ("--finetune", "--epochs", "1", "--dataset", str(file))
    assert cli(*words, "--class_weights", "balanced", dataset=None)[0] == 0
    ((counts, found),) = seen
    assert counts[1] * 5 < counts[0] + counts[1]
    torch.testing.assert_close(found * torch.tensor(counts), torch.full((2,), counts.sum() / 2.0))
    assert cli(*words, dataset=None)[0] == 0 and len(seen) == 1
    weighted, plain = (read_lines(run / "metrics.jsonl")[0]["train/loss"] for run in sorted(cli.runs.iterdir())[::-1])
    assert weighted != plain
    assert "macro_f1" in read_json(next(cli.runs.iterdir()) / "result.json")["test"]


def test_a_balanced_baseline_finds_the_rare_class_more_often(cli, tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for n in range(600):  # every tenth row is rare, and its words tell so in two cases of three
        usual, other = ("great film", "dull story") if n % 10 else ("dull story", "great film")
        lines.append(f"{usual if rng.random() < 2 / 3 else other} {n},{'no' if n % 10 else 'yes'}")
    (tmp_path / "mine.csv").write_text("text,label\n" + "\n".join(lines))
    recalls = []
    for way in ("none", "balanced"):
        words = ("--baseline", "--dataset", str(tmp_path / "mine.csv"), "--class_weights", way)
        assert cli(*words, "--output_dir", str(tmp_path / way), dataset=None)[0] == 0
        (run,) = (tmp_path / way).iterdir()
        recalls.append(read_json(run / "result.json")["test"]["recall"])
    assert recalls[1] > recalls[0]


READ = """
import resource, sys
from pathlib import Path
from readers import read_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert read_file(Path(sys.argv[1])).num_rows == 200_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_reading_many_rows_takes_memory_of_the_size_of_the_text(tmp_path, kind):
    """200,000 rows of 110 characters are 22 MB of text; lists of their dicts were ten times that."""
    file, text = tmp_path / f"f.{kind}", "a rather good film with a story that goes on and on and on and " * 2
    line = "{0}{1},pos\n" if kind == "csv" else '{{"text": "{0}{1}", "label": "pos"}}\n'
    with file.open("w") as handle:
        handle.write("text,label\n" * (kind == "csv"))
        handle.writelines(line.format(text, n) for n in range(200_000))
    words = [sys.executable, "-c", READ, str(file)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 70  # MB


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    import progress

    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress.progress_bar(3, "tokenising train") as bar:
        for _ in range(3):
            bar.update(1)
    err = capsys.readouterr().err
    assert "tokenising train" in err and "3/3" in err and "\r" not in err and err.endswith("\n")
