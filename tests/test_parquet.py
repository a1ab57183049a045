"""Parquet files, right and wrong, to texts and classes."""

from collections import Counter

import pyarrow as pa
import pytest
from test_data import ROWS, load, note, pairs, refusal, write_parquet, written


@pytest.mark.parametrize("column", [[None, "x", ""], [float("nan"), 1.0, None], [None, 1, None]])
def test_missing_values_in_parquet(column, tmp_path):
    labels = {str: "y", float: 0.0, int: 0}[type(column[1])]
    file = write_parquet(
        tmp_path / "f.parquet",
        text=pa.array([*map(str, range(62)), None]),
        label=pa.array([column[1], labels] * 30 + [column[0], column[2], labels], from_pandas=False),
    )
    found = load(file)
    assert sum(pairs(found).values()) == 60
    assert note(found, "dropped") == "train: dropped 3 of 63 rows: 1 without text, 2 without label"


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


def test_class_names_that_a_file_carries_are_kept(tmp_path):
    labels = [int(label == "pos") for _, label in ROWS]
    file = write_parquet(tmp_path / "f.parquet", ["bad", "good", "unused"], sentence=[t for t, _ in ROWS], label=labels)
    found = load(file)
    assert found.label_names == ("bad", "good")
    assert note(found, "left out") == "classes without a row are left out: ['unused']"
    assert pairs(found) == Counter((text, "good" if label == "pos" else "bad") for text, label in ROWS)


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
    assert "labels from 0 to 1, found 2" in refusal(file)


def test_names_that_differ_between_parts_are_refused(tmp_path):
    for part, names in enumerate((["neg", "pos"], ["pos", "neg"])):
        write_parquet(tmp_path / f"train-{part}.parquet", names, text=["x", "y"] * 9, label=[0, 1] * 9)
    assert "(train): expected files with the same class names" in refusal(tmp_path)


def test_words_beside_numbers_with_names_are_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["neg", "pos"], text=["x", "y"] * 9, label=[0, 1] * 9)
    write_parquet(tmp_path / "test.parquet", text=["x", "y"] * 9, label=["neg", "pos"] * 9)
    assert "expected numbers as labels in every split" in refusal(tmp_path)


def test_names_that_differ_between_splits_are_refused(tmp_path):
    for split, names in (("train", ["neg", "pos"]), ("test", ["pos", "neg"])):
        write_parquet(tmp_path / f"{split}.parquet", names, text=["x", "y"] * 9, label=[0, 1] * 9)
    assert "same class names" in refusal(tmp_path)
