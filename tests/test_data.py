"""From files, right and wrong, to splits, classes, token ids and batches."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

import data
import packaged
from config import UserError
from data import TextData, epoch_batches, epoch_steps, load_data, sorted_batches

ROWS = [(f"good film {i}", "pos") for i in range(30)] + [(f"bad film {i}", "neg") for i in range(30)]
BASE = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
NEXT_LINE = BASE.count("\n") + 1


def load(path: Path, limit: int | None = None, seed: int = 0) -> TextData:
    return load_data(str(path), None, limit, seed)


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, names: list[str] | None = None, **columns) -> Path:
    """A parquet file; with `names`, its labels carry class names as the hub's files do."""
    table = pa.table(columns)
    if names:
        text = next(iter(columns))
        features = {text: {"dtype": "string", "_type": "Value"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def pairs(found: TextData) -> Counter:
    """Every (text, class name), whichever split it is in."""
    named = (rows for rows in found.splits.values())
    return Counter((row["text"], found.label_names[row["label"]]) for rows in named for row in rows)


def texts(found: TextData, split: str) -> list[str]:
    return found.splits[split]["text"][:]


def note(found: TextData, word: str) -> str:
    return next((line for line in found.notes if word in line), "")


# ---------------------------------------------------------------- what is read

FORMATS = {
    "f.csv": BASE,
    "f.CSV": BASE,
    "f.tsv": BASE.replace(",", "\t"),
    "f.jsonl": "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS),
    "lines.json": "\n".join(json.dumps({"label": label, "id": 7, "text": text}) for text, label in ROWS) + "\n\n",
    "list.json": json.dumps([{"text": text, "label": label} for text, label in ROWS], indent=1),
    "bom.csv": b"\xef\xbb\xbf" + BASE.encode(),
    "crlf.csv": BASE.replace("\n", "\r\n"),
    "cr.csv": BASE.replace("\n", "\r"),
    "no_last_newline.csv": BASE.removesuffix("\n"),
    "blank_lines.csv": BASE.replace("\n", "\n\n"),
    "quoted.csv": BASE.replace("good film 0", '"good film 0"'),
    "other_columns.csv": BASE.replace("text,label", "idx,Sentence , Sentiment")
    .replace("\nbad", "\n1,bad")
    .replace("\ngood", "\n1,good"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name, tmp_path):
    found = load(written(tmp_path / name, FORMATS[name]))
    assert pairs(found) == Counter(ROWS) and found.label_names == ("neg", "pos")
    assert found.kind == "local" and found.name == name.split(".")[0]
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 48, "validation": 6, "test": 6}
    assert not note(found, "dropped")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_folder_holds_a_file_for_each_split(kind, tmp_path):
    parts = {"train-00000-of-00002": ROWS[:20], "train-00001-of-00002": ROWS[30:50], "dev": ROWS[20:25] + ROWS[50:55]}
    parts |= {"test": ROWS[25:30] + ROWS[55:], "notes_on_training": [("x", "y")]}
    for stem, rows in parts.items():
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        if kind == "parquet":
            write_parquet(tmp_path / f"{stem}.parquet", **columns)
        elif kind == "jsonl":
            written(tmp_path / f"{stem}.jsonl", "".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows))
        else:
            between = "\t" if kind == "tsv" else ","
            written(tmp_path / f"{stem}.{kind}", "".join(f"{t}{between}{c}\n" for t, c in [("text", "label"), *rows]))
    written(tmp_path / "README.md", "not data")
    found = load(tmp_path)
    assert pairs(found) == Counter(ROWS) and found.notes == ()
    assert texts(found, "train") == [text for text, _ in ROWS[:20] + ROWS[30:50]]
    assert texts(found, "validation") == [text for text, _ in ROWS[20:25] + ROWS[50:55]]


def test_words_that_look_like_nothing_are_texts(tmp_path):
    words = [
        "NA",
        "null",
        "None",
        "nan",
        "N/A",
        "0",
        "true",
        "-1",
        "1e5",
        " padded ",
        "a,b",
        'say "so"',
        "two\nlines",
        "é漢🎬",
    ]
    quoted = ['"' + word.replace('"', '""') + '"' for word in words]
    found = load(written(tmp_path / "f.csv", BASE + "".join(f"{word},pos\n" for word in quoted)))
    assert pairs(found) == Counter(ROWS + [(word, "pos") for word in words])
    found = load(written(tmp_path / "plain.csv", BASE + "NA,pos\nnull,pos\nNone,neg\n7,neg\n"))
    assert pairs(found) == Counter([*ROWS, ("NA", "pos"), ("null", "pos"), ("None", "neg"), ("7", "neg")])


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    text = "one\u2028two\u0085three\x1cfour"
    line = f'{{"text": "{text}", "label": "pos"}}\n'.replace("\x1c", "\\u001c")
    assert pairs(load(written(tmp_path / "f.jsonl", FORMATS["f.jsonl"] + line)))[(text, "pos")] == 1


def test_a_line_of_a_megabyte_is_one_text(tmp_path):
    long = "word " * 220_000
    found = load(written(tmp_path / "f.csv", f"{BASE}{long},pos\n"))
    assert pairs(found)[(long, "pos")] == 1 and sum(pairs(found).values()) == 61


MISSING = {
    "f.csv": BASE + ",pos\n   ,pos\nno label,\nno label either,  \n",
    "nan.csv": BASE.replace(",pos", ",1").replace(",neg", ",0") + ",1\n \t,0\na,NaN\nb,\n",
    "minus.csv": BASE.replace(",pos", ",1").replace(",neg", ",0") + ",1\n \t,0\na,-1\nb,-1.0\n",
    "f.jsonl": FORMATS["f.jsonl"]
    + '{"label":"pos"}\n{"text":null,"label":"pos"}\n{"text":"a"}\n{"text":"b","label":null}\n',
}


@pytest.mark.parametrize("name", MISSING)
def test_rows_without_text_or_label_are_dropped_and_counted(name, tmp_path):
    found = load(written(tmp_path / name, MISSING[name]))
    assert sum(pairs(found).values()) == 60 and len(found.label_names) == 2
    assert note(found, "dropped").startswith("train: dropped 4 of 64 rows: 2 without text, 2 without label")


@pytest.mark.parametrize("column", [[None, "x", ""], [float("nan"), 1.0, -1.0], [None, 1, -1]])
def test_missing_values_in_parquet(column, tmp_path):
    labels = {str: "y", float: 0.0, int: 0}[type(column[1])]
    file = write_parquet(
        tmp_path / "f.parquet",
        text=pa.array([*map(str, range(62)), None]),
        label=pa.array([column[1], labels] * 30 + [column[0], column[2], labels], from_pandas=False),
    )
    found = load(file)
    assert sum(pairs(found).values()) == 60
    assert note(found, "dropped") == "train: dropped 3 of 63 rows: 1 without text, 2 without label (-1 counts as none)"


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("neg", "pos", ("neg", "pos")),
        ("0", "1", ("0", "1")),
        ("3", "10", ("3", "10")),  # in the order of the numbers, not of the letters
        ("1.0", "2.0", ("1", "2")),  # what pandas makes of whole numbers beside a missing one
        ("false", "true", ("false", "true")),
        ("0", "one", ("0", "one")),
        ("none", "some", ("none", "some")),
    ],
)
def test_labels_in_text_files(first, second, names, tmp_path):
    found = load(written(tmp_path / "f.csv", BASE.replace(",neg", f",{first}").replace(",pos", f",{second}")))
    assert found.label_names == names
    assert pairs(found) == Counter((text, names[label == "pos"]) for text, label in ROWS)
    assert set(found.splits["train"]["label"]) == {0, 1}


@pytest.mark.parametrize(
    ("low", "high", "kind", "names"),
    [
        (4, 9, pa.int8(), ("4", "9")),
        (0, 1, pa.uint64(), ("0", "1")),
        (1.0, 2.0, pa.float32(), ("1", "2")),
        (False, True, pa.bool_(), ("False", "True")),
        ("a", "b", pa.large_string(), ("a", "b")),
        ("a", "b", pa.dictionary(pa.int8(), pa.string()), ("a", "b")),
    ],
)
def test_labels_in_parquet(low, high, kind, names, tmp_path):
    labels = pa.array([high if label == "pos" else low for _, label in ROWS], kind)
    found = load(
        write_parquet(tmp_path / "f.parquet", sentence=pa.array([t for t, _ in ROWS], pa.large_string()), label=labels)
    )
    assert found.label_names == names
    assert pairs(found) == Counter((text, names[label == "pos"]) for text, label in ROWS)


@pytest.mark.parametrize("value", [("true", "false"), ("1", "0"), ("1.0", "0.0"), ('"1"', "0"), ('"pos"', '"neg"')])
def test_labels_in_json(value, tmp_path):
    lines = (f'{{"text": "{text}", "label": {value[label == "neg"]}}}\n' for text, label in ROWS)
    found = load(written(tmp_path / "f.jsonl", "".join(lines)))
    assert len(found.label_names) == 2
    assert {row["label"] for row in found.splits["train"] if "good" in row["text"]} == {1}


def test_class_names_that_a_file_carries_are_kept(tmp_path):
    labels = [int(label == "pos") for _, label in ROWS]
    file = write_parquet(tmp_path / "f.parquet", ["bad", "good", "unused"], sentence=[t for t, _ in ROWS], label=labels)
    found = load(file)
    assert found.label_names == ("bad", "good", "unused") and found.num_classes == 3
    assert pairs(found) == Counter((text, "good" if label == "pos" else "bad") for text, label in ROWS)


def test_a_known_name_gives_its_numbers_their_names(tmp_path):
    (tmp_path / "ag_news").mkdir()
    rows = "".join(f"text {i},{i % 4}\n" for i in range(80))
    written(tmp_path / "ag_news" / "train.csv", "text,label\n" + rows)
    assert load(tmp_path / "ag_news").label_names == ("World", "Sports", "Business", "Sci/Tech")


def test_a_class_missing_from_test_is_noted(tmp_path):
    written(tmp_path / "train.csv", BASE)
    written(tmp_path / "test.csv", "text,label\nnice,pos\n")
    assert "'neg'" in note(load(tmp_path), "test: no row of")


# ---------------------------------------------------------------- what is refused

JSONL = FORMATS["f.jsonl"]
REFUSED = {
    "ragged: too many": ("f.csv", BASE + "a,b,c\n", [f"line {NEXT_LINE}", "2 columns", "found 3"]),
    "ragged: too few": ("f.csv", BASE + "a\n", [f"line {NEXT_LINE}", "2 columns", "found 1"]),
    "ragged behind a text of two lines": ("f.csv", BASE + '"a\nb",pos\nc\n', [f"line {NEXT_LINE + 2}", "found 1"]),
    "semicolons": ("f.csv", BASE.replace(",", ";"), ["expected a column text", "text;label", "comma-separated"]),
    "tabs in a csv": ("f.csv", BASE.replace(",", "\t"), ["expected a column text", r"text\tlabel", "tab-separated"]),
    "commas in a tsv": ("f.tsv", BASE, ["expected a column text", "text,label"]),
    "no text column": ("f.csv", BASE.replace("text,", "words,"), ["expected a column text", "'words'"]),
    "no label column": ("f.csv", BASE.replace(",label", ",score"), ["expected a column label", "'score'"]),
    "no header": ("f.csv", BASE.split("\n", 1)[1], ["expected a column text", "good film 0"]),
    "a header of a megabyte": ("f.csv", "x" * 2**20, ["expected a column text", "..."]),
    "open quote": ("f.csv", BASE + '"never closed,pos\n' + "a,pos\n" * 50, [f"line {NEXT_LINE}", "quotes"]),
    "NUL byte": ("f.csv", BASE + "a\0b,pos\n", [f"line {NEXT_LINE}", "NUL", "UTF-8"]),
    "NUL byte in JSON": ("f.jsonl", JSONL + '{"text": "\0"}', ["line 61", "NUL"]),
    "latin-1": ("f.csv", BASE.encode() + b"caf\xe9,pos\n", [f"line {NEXT_LINE}", "UTF-8", "0xe9"]),
    "latin-1 behind a BOM": ("f.csv", b"\xef\xbb\xbf" + BASE.encode() + b"\xe9", [f"line {NEXT_LINE}", "0xe9"]),
    "UTF-16": ("f.csv", BASE.encode("utf-16"), ["line 1", "UTF-8", "0xff"]),
    "a picture": ("f.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ["line 1", "UTF-8", "0x89"]),
    "empty": ("f.csv", "", ["empty file"]),
    "empty JSON": ("f.jsonl", "\n\n", ["empty file"]),
    "only a BOM": ("f.csv", b"\xef\xbb\xbf", ["empty file"]),
    "header only": ("f.csv", "text,label\n", ["expected rows", "found none"]),
    "an empty list": ("f.json", "[]", ["expected rows", "found none"]),
    "fractions": (
        "f.csv",
        BASE.replace(",pos", ",1").replace(",neg", ",0") + "x,0.5\n",
        ["row 61", "whole number", "0.5"],
    ),
    "negative classes": ("f.csv", BASE.replace(",pos", ",2").replace(",neg", ",-2"), ["row 31", "whole number", "-2"]),
    "one class": ("f.csv", BASE.replace(",neg", ",pos"), ["two classes", "'pos'"]),
    "only -1": ("f.csv", BASE.replace(",neg", ",-1").replace(",pos", ",-1"), ["text and a label", "found none"]),
    "no texts": ("f.csv", "text,label\n" + ",pos\n,neg\n" * 9, ["text and a label", "found none"]),
    "too few rows": ("f.csv", "text,label\na,pos\nb,neg\n", ["enough rows", "too few"]),
    "one text under both labels": ("f.csv", "text,label\n" + "a,pos\na,neg\n" * 9, ["enough rows", "too few"]),
    "cut JSON": ("f.jsonl", JSONL + '{"text": "a", "la', ["line 61", "expected JSON", '{"text": "a", "la']),
    "JSON numbers": ("f.jsonl", JSONL + "5\n", ["line 61", "an object", "found 5"]),
    "JSON lists": ("f.json", '[["a", "pos"], ["b", "neg"]]', ["row 1", "an object", "['a', 'pos']"]),
    "JSON, text a number": ("f.jsonl", JSONL + '{"text": 5, "label": "pos"}', ["line 61", "a text", "found 5"]),
    "JSON, text a list": ("f.jsonl", JSONL + '{"text": ["a"], "label": "pos"}', ["line 61", "a text", "['a']"]),
    "JSON, label a list": ("f.jsonl", JSONL + '{"text": "a", "label": ["pos"]}', ["line 61", "a name", "['pos']"]),
    "JSON, half a character": ("f.jsonl", JSONL + '{"text": "\\ud800", "label": "pos"}', ["line 61", r"'\ud800'"]),
    "JSON, deep": ("f.jsonl", JSONL + "[" * 200_000, ["line 61", "expected JSON"]),
    "JSON, infinite label": ("f.jsonl", JSONL.replace('"pos"', "1").replace('"neg"', "Infinity"), []),
    "CSV called JSON": ("f.jsonl", BASE, ["line 1", "expected JSON", "text,label"]),
    "CSV called parquet": ("f.parquet", BASE, ["expected a parquet file"]),
    "empty parquet": ("f.parquet", "", ["expected a parquet file"]),
    "unknown ending": ("f.xlsx", BASE, ["expected one file", ".csv", "f.xlsx"]),
}


def refusal(path: Path | str, **options) -> str:
    with pytest.raises(UserError) as refused:
        load_data(str(path), options.pop("dataset_dir", None), options.pop("limit", None), 0)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    return str(refused.value)


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_refused_in_one_line(case, tmp_path, capfd):
    name, content, expected = REFUSED[case]
    if case == "JSON, infinite label":  # then all labels are words, and Infinity is one as any other
        assert load(written(tmp_path / name, content)).label_names == ("1", "inf")
        return
    said = refusal(written(tmp_path / name, content))
    assert str(tmp_path / name) in said
    assert all(part in said for part in expected), said
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""  # the libraries underneath say nothing of their own


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": ["a", "b"] * 9, "label": [0.5, 1.0] * 9}, ["row 1", "whole number", "0.5"]),
        ({"text": ["a", "b"] * 9, "label": [float("inf"), 1.0] * 9}, ["row 1", "whole number", "inf"]),
        ({"text": ["a", "b"] * 9, "label": [[0], [1]] * 9}, ["whole numbers as labels", "list"]),
        ({"text": ["a", "b"] * 9, "label": [b"0", b"1"] * 9}, ["whole numbers as labels", "binary"]),
        ({"text": [1, 2] * 9, "label": [0, 1] * 9}, ["expected text", "int64"]),
        ({"text": ["a", "b"] * 9, "label": pa.nulls(18)}, ["text and a label", "found none"]),
        ({"text": pa.nulls(18), "label": [0, 1] * 9}, ["text and a label", "found none"]),
        ({"title": ["a", "b"] * 9, "label": [0, 1] * 9}, ["expected a column text", "'title'"]),
        ({"text": [], "label": []}, ["text and a label", "found none"]),
    ],
)
def test_bad_parquet_columns_are_refused_in_one_line(columns, expected, tmp_path):
    said = refusal(write_parquet(tmp_path / "f.parquet", **columns))
    assert str(tmp_path / "f.parquet") in said and all(part in said for part in expected), said


def test_damaged_parquet_is_refused_in_one_line(tmp_path):
    file = write_parquet(tmp_path / "f.parquet", text=["a", "b"] * 50, label=[0, 1] * 50)
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole[len(whole) // 2 :], whole[:4] + whole[-8:]):
        assert "expected a parquet file" in refusal(written(tmp_path / "cut.parquet", damaged))


def test_parquet_that_is_not_utf8_is_refused_in_one_line(tmp_path):
    for column in ("text", "label"):
        bad = pa.array([b"\xff\xfe", b"b"] * 9).view(pa.string())
        columns = {"text": pa.array(["a", "b"] * 9), "label": pa.array(["c", "d"] * 9)} | {column: bad}
        assert "UTF-8" in refusal(write_parquet(tmp_path / "f.parquet", **columns))


def test_a_label_beyond_the_names_is_refused(tmp_path):
    file = write_parquet(tmp_path / "f.parquet", ["a", "b"], text=["x", "y", "z"] * 9, label=[0, 1, 2] * 9)
    assert "labels below 2, found 2" in refusal(file)


def test_names_that_differ_between_splits_are_refused(tmp_path):
    for split, names in (("train", ["neg", "pos"]), ("test", ["pos", "neg"])):
        write_parquet(tmp_path / f"{split}.parquet", names, text=["x", "y"] * 9, label=[0, 1] * 9)
    assert "same class names" in refusal(tmp_path)


@pytest.mark.parametrize(("train", "test"), [("01", "2"), ("01", "x"), (("neg", "pos"), ("neutral",))])
def test_a_class_that_train_lacks_is_refused(train, test, tmp_path):
    for split, labels in (("train", train), ("test", [*train, *test])):
        rows = "".join(f"{split} {i},{labels[i % len(labels)]}\n" for i in range(30))
        written(tmp_path / f"{split}.csv", "text,label\n" + rows)
    said = refusal(tmp_path)
    assert f"{tmp_path} (test)" in said and f"found the classes ['{test[0]}']".replace("'2'", "2") in said


def test_a_folder_without_train_or_with_mixed_kinds_is_refused(tmp_path):
    assert "found []" in refusal(tmp_path)
    written(tmp_path / "test.csv", BASE)
    assert "found ['test.csv']" in refusal(tmp_path)
    written(tmp_path / "train.jsonl", JSONL)
    assert "of one kind, found ['test.csv', 'train.jsonl']" in refusal(tmp_path)


def test_a_folder_called_as_a_file_is_refused(tmp_path):
    (tmp_path / "train.csv").mkdir()
    assert "train.csv: cannot be read: Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["nowhere/f.csv", "nowhere.jsonl", "./nowhere", "/nowhere", "~nowhere", "x" * 5000 + ".csv"]
)
def test_what_is_not_there_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a file, a folder or a data set's name, found nothing"):
        load_data(name, None, None, 0)
    with pytest.raises(UserError, match="--dataset_dir: expected a folder"):
        load_data(None, name, None, 0)


# ---------------------------------------------------------------- where it is looked for


def test_where_a_name_is_looked_for(tmp_path, monkeypatch):
    for place in ("cwd/sst2", "given/sst2", "given/rotten_tomatoes", "packaged"):
        (tmp_path / place).mkdir(parents=True)
        written(tmp_path / place / "train.csv", BASE.replace("film", place))
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(packaged, "reviews_folder", lambda: tmp_path / "packaged")

    def first_text(dataset: str | None, dataset_dir: str | None) -> tuple[str, str]:
        found = load_data(dataset, dataset_dir, None, 0)
        return found.kind, texts(found, "train")[0].split()[1]

    given = str(tmp_path / "given")
    assert first_text("sst2", None) == ("local", "cwd/sst2")
    assert first_text("sst2", given) == ("local", "given/sst2")
    assert first_text(None, given) == ("local", "given/rotten_tomatoes")
    assert first_text(None, str(tmp_path)) == ("packaged", "packaged")
    assert load_data(None, None, None, 0).name == packaged.REVIEWS_NAME
    for named in ("rotten_tomatoes", "imdb", "someone/something"):  # what is named is never replaced
        said = refusal(named)
        assert f"--dataset {named}: the hub (" in said and "cannot be reached" in said


# ---------------------------------------------------------------- splits


def shuffled_file(path: Path, rows: list[tuple[str, str]], seed: int) -> Path:
    order = np.random.default_rng(seed).permutation(len(rows))
    return written(path, "text,label\n" + "".join(f"{rows[i][0]},{rows[i][1]}\n" for i in order))


def test_the_hold_out_rule_knows_neither_seed_nor_order(tmp_path):
    rows = [(f"text {i}", "pos" if i % 4 else "neg") for i in range(400)]
    found = [load(shuffled_file(tmp_path / f"{seed}.csv", rows, seed), seed=seed) for seed in (0, 1)]
    for split in ("train", "validation", "test"):
        assert set(texts(found[0], split)) == set(texts(found[1], split))
    assert texts(found[0], "train") != texts(found[1], "train")
    assert Counter(found[0].splits["test"]["label"][:]) == {0: 10, 1: 30}  # a tenth of each class
    assert Counter(found[0].splits["validation"]["label"][:]) == {0: 9, 1: 27}  # a tenth of the rest
    assert pairs(found[0]) == Counter(rows)
    assert note(found[0], "test: 40 rows held out") and note(found[0], "validation: 36 rows held out")
    fewer = load(shuffled_file(tmp_path / "fewer.csv", rows[:396], 0))  # a few rows less move only a few rows
    assert len(set(texts(fewer, "test")) & set(texts(found[0], "test"))) >= 36


def test_copies_of_a_text_are_held_out_together(tmp_path):
    rows = [(f"text {i}", "pos" if i % 2 else "neg") for i in range(100)] * 3
    rows += [(f"text {i}", "neg" if i % 2 else "pos") for i in range(100)]  # and once under the other label
    found = load(shuffled_file(tmp_path / "f.csv", rows, 0))
    assert pairs(found) == Counter(rows) and not note(found, "leakage")
    for split in ("validation", "test"):
        assert set(Counter(texts(found, split)).values()) == {4}
        assert 20 <= len(texts(found, split)) <= 100


def test_at_most_2000_rows_are_held_out(tmp_path):
    found = load(written(tmp_path / "f.csv", "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(30_000))))
    assert len(found.splits["test"]) == len(found.splits["validation"]) == 2000


def test_rare_classes_are_never_held_out_whole(tmp_path):
    rows = [*ROWS, ("one", "rare"), *[("same", "copied")] * 5, ("two", "twice"), ("three", "twice")]
    found = load(shuffled_file(tmp_path / "f.csv", rows, 0))
    assert {found.label_names[label] for label in found.splits["train"]["label"]} == set(found.label_names)
    assert "rare" in note(found, "test: no row of")


def test_sst2_shape_its_labelled_validation_becomes_the_test_set(tmp_path):
    for split, n in (("train", 100), ("validation", 20), ("test", 10)):
        labels = [-1] * n if split == "test" else [i % 2 for i in range(n)]
        rows = {"sentence": [f"{split} {i}" for i in range(n)], "label": labels}
        write_parquet(tmp_path / f"{split}.parquet", ["negative", "positive"], **rows)
    found = load(tmp_path)
    assert texts(found, "test") == [f"validation {i}" for i in range(20)]
    assert len(texts(found, "validation")) == 10 and all(
        text.startswith("train") for text in texts(found, "validation")
    )
    assert found.label_names == ("negative", "positive")
    assert note(found, "test: dropped 10 of 10 rows") and note(found, "the validation split is the test set")


def test_texts_shared_between_splits_are_warned_of(tmp_path):
    written(tmp_path / "train.csv", BASE)
    written(tmp_path / "validation.csv", "text,label\ngood film 1,pos\nnew,neg\nnew too,neg\n")
    written(tmp_path / "test.csv", "text,label\n good film 2,pos\nbad film 1,pos\nnew,neg\nnewest,neg\n")
    found = load(tmp_path)
    assert note(found, "leakage: 1 of 3 validation texts are also in train")
    assert note(found, "leakage: 3 of 4 test texts are also in train or validation")


def test_limit_draws_at_random_from_rows_sorted_by_class(tmp_path):
    rows = [(f"text {i}", "pos" if i < 200 else "neg") for i in range(400)]
    file = written(tmp_path / "f.csv", "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    whole, drawn, again, other = load(file), load(file, 100), load(file, 100), load(file, 100, seed=1)
    assert len(set(texts(drawn, "train"))) == 100 and set(texts(drawn, "train")) < set(texts(whole, "train"))
    assert 30 <= sum(drawn.splits["train"]["label"][:]) <= 70
    assert drawn.fingerprints == again.fingerprints and texts(drawn, "train") == texts(again, "train")
    assert 5 < len(set(texts(drawn, "train")) & set(texts(other, "train"))) < 60
    for split in ("validation", "test"):  # only training rows are drawn
        assert texts(drawn, split) == texts(whole, split) == texts(other, split)
    assert load(file, 10_000).fingerprints == whole.fingerprints
    assert "--limit" in refusal(file, limit=1)


def test_a_fingerprint_tells_every_change(tmp_path):
    rows = [("train", ROWS), ("validation", ROWS[25:35]), ("test", ROWS[20:40])]
    for split, some in rows:
        written(tmp_path / f"{split}.csv", "text,label\n" + "".join(f"{text},{label}\n" for text, label in some))
    first = load(tmp_path).fingerprints
    train = (tmp_path / "train.csv").read_text()
    changes = [train.replace("good film 7,", "good film 77,"), train.replace("good film 7,pos", "good film 7,neg")]
    changes.append(train.replace("good film 7,pos\ngood film 8,pos", "good film 8,pos\ngood film 7,pos"))
    found = [first["train"]]
    for change in changes:
        written(tmp_path / "train.csv", change)
        changed = load(tmp_path).fingerprints
        assert changed["test"] == first["test"]
        found.append(changed["train"])
    assert len(set(found)) == 4
    written(tmp_path / "train.csv", train)
    assert load(tmp_path).fingerprints == first


# ---------------------------------------------------------------- tokens

TOKENISE = """
import sys
from transformers import AutoTokenizer
from data import load_data
from tokens import Cutter, tokenize

class Counting:
    def __init__(self, tokenizer): self.inner, self.texts = tokenizer, 0
    def __getattr__(self, name): return getattr(self.inner, name)
    def __call__(self, texts, **options):
        self.texts += 0 if isinstance(texts, str) else len(texts)
        return self.inner(texts, **options)

def tokenised(model, file, max_length):
    counting = Counting(AutoTokenizer.from_pretrained(model))
    splits, _ = tokenize(load_data(file, None, None, 0), Cutter(counting, max_length))
    return splits, counting.texts
"""


@pytest.fixture
def tokenised(tiny_model, tmp_path, monkeypatch):
    """tokenised(file, max_length) -> (splits, how many texts went through the tokenizer), with an empty cache."""
    monkeypatch.setenv("DISTILBERT_SENTIMENT_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    exec(TOKENISE, names)  # noqa: S102 - the same lines run in a process of their own below
    return lambda file, max_length=32: names["tokenised"](tiny_model, str(file), max_length)


def test_texts_are_tokenised_once(tokenised, tiny_model, tmp_path):
    file = written(tmp_path / "f.csv", BASE)
    first, count = tokenised(file)
    assert count == 60
    again, count = tokenised(file)
    assert count == 0
    for split in first:
        rows = np.arange(len(first[split]))
        assert isinstance(first[split].ids, np.memmap)
        assert first[split].batch(rows).input_ids.equal(again[split].batch(rows).input_ids)
    moved = written(tmp_path / "elsewhere.csv", BASE)
    code = f"{TOKENISE}\nprint(tokenised({str(tiny_model)!r}, {str(moved)!r}, 32)[1])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout.split() == ["0"]  # another process, the same texts
    assert tokenised(file, 5)[1] == 60  # another length, other tokens
    assert tokenised(written(file, BASE.replace("good film 3,", "great film 3,")))[1] in (48, 6)  # only its split


def test_a_batch_is_what_the_tokenizer_makes_of_the_texts(tokenised, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    rows = [
        (" ".join(["film good !", "bad film"][i % 2] for _ in range(1 + i % 7)), ["pos", "neg"][i % 2])
        for i in range(60)
    ]
    file = shuffled_file(tmp_path / "f.csv", [(f"{text} {i}", label) for i, (text, label) in enumerate(rows)], 0)
    splits, _ = tokenised(file, 12)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = load(file).splits["train"]
    split = splits["train"]
    for indices in (np.array([3, 4]), np.array([5, 0, 5, 17]), np.arange(len(split))[::-1]):
        batch = split.batch(indices)
        chosen = [plain["text"][int(i)] for i in indices]
        expected = tokenizer(chosen, truncation=True, max_length=12, padding=True, return_tensors="pt")
        assert batch.input_ids.equal(expected["input_ids"]) and batch.attention_mask.equal(expected["attention_mask"])
        assert batch.labels.tolist() == [plain["label"][int(i)] for i in indices]
        assert (split.lengths[indices] == expected["attention_mask"].sum(1).numpy()).all()
        assert batch.lengths.tolist() == split.lengths[indices].tolist() and batch.whole == len(indices)
        part = split.batch(indices, 1, 3)  # one process's share: padded as the whole batch is
        assert part.input_ids.equal(batch.input_ids[1:3]) and part.attention_mask.equal(batch.attention_mask[1:3])
        assert part.labels.equal(batch.labels[1:3]) and (part.first, part.whole) == (1, len(indices))
    assert batch.input_ids.shape[1] == 12 and (batch.attention_mask[:, -1] == 0).any()  # cut and padded, on the right


def test_a_cache_that_cannot_be_written_is_refused(tokenised, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILBERT_SENTIMENT_CACHE", str(written(tmp_path / "a_file", "")))
    with pytest.raises(UserError, match=r"cannot be written to .*a_file"):
        tokenised(written(tmp_path / "f.csv", BASE))


# ---------------------------------------------------------------- batches

LENGTHS = np.random.default_rng(0).integers(3, 60, 2500).astype(np.int32)


@pytest.mark.parametrize(
    ("n", "size"), [(2500, 16), (1, 16), (16, 16), (17, 16), (1024, 16), (1025, 16), (50, 1), (7, 100)]
)
def test_every_row_is_in_one_batch(n, size):
    for batches in (epoch_batches(LENGTHS[:n], size, 3, 1), list(sorted_batches(LENGTHS[:n], size))):
        assert sorted(np.concatenate(batches)) == list(range(n))
        sizes = sorted((len(batch) for batch in batches), reverse=True)
        assert sizes == [size] * (n // size) + ([n % size] if n % size else [])
    steps = list(epoch_steps(LENGTHS[:n], size, 3, 3, 1))
    assert [len(step) for step in steps[:-1]] == [3] * (len(steps) - 1) and 1 <= len(steps[-1]) <= 3
    flat = [batch.tolist() for step in steps for batch in step]
    assert flat == [batch.tolist() for batch in epoch_batches(LENGTHS[:n], size, 3, 1)]


def test_epoch_batches_are_a_pure_function_of_their_arguments():
    def rows(seed: int, epoch: int) -> list[list[int]]:
        return [batch.tolist() for batch in epoch_batches(LENGTHS, 16, seed, epoch)]

    before = LENGTHS.copy()
    first = rows(0, 0)
    np.random.seed(5)
    assert rows(0, 0) == first and (before == LENGTHS).all()
    together = {frozenset(batch) for batch in first}
    for other in (rows(0, 1), rows(1, 0)):  # other batches, not only another order of the same
        assert len(together & {frozenset(batch) for batch in other}) < len(together) / 10
    assert rows(0, 1) != rows(1, 0)


def test_batches_are_of_like_length_in_random_order():
    batches = epoch_batches(LENGTHS, 16, 0, 0)
    longest = np.array([LENGTHS[batch].max() for batch in batches])
    padded = sum(longest[i] * len(batch) for i, batch in enumerate(batches))
    assert padded / LENGTHS.sum() < 1.1  # random batches: about 1.8
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3
    ordered = [LENGTHS[batch].max() for batch in sorted_batches(LENGTHS, 16)]
    assert ordered == sorted(ordered, reverse=True)


def test_known_names_are_the_hubs():
    assert {name: known.hub_id for name, known in data.KNOWN.items()} == {
        "rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes",
        "sst2": "stanfordnlp/sst2",
        "imdb": "stanfordnlp/imdb",
        "ag_news": "fancyzhx/ag_news",
    }
