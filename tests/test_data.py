"""From files of text, right and wrong, to texts and classes."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from config import UserError
from data import TextData, load_data


def csv(rows: list[tuple]) -> str:
    return "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)


ROWS = [(f"good film {i}", "pos") for i in range(30)] + [(f"bad film {i}", "neg") for i in range(30)]
BASE = csv(ROWS)
NUMBERED = BASE.replace(",pos", ",1").replace(",neg", ",0")
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
    rows = (row for split in found.splits.values() for row in split)
    return Counter((row["text"], found.label_names[row["label"]]) for row in rows)


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
JSONL = FORMATS["f.jsonl"]


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
            written(tmp_path / f"{stem}.{kind}", csv(rows).replace(",", "\t" if kind == "tsv" else ","))
    written(tmp_path / "README.md", "not data")
    found = load(tmp_path)
    assert pairs(found) == Counter(ROWS) and found.notes == ()
    assert texts(found, "train") == [text for text, _ in ROWS[:20] + ROWS[30:50]]
    assert texts(found, "validation") == [text for text, _ in ROWS[20:25] + ROWS[50:55]]


def test_other_files_of_a_folder_are_not_added_to_a_split(tmp_path):
    """An older copy, or what --predict has left, would count its rows twice."""
    for name, rows in (("train", ROWS[:40]), ("validation", ROWS[40:50]), ("test", ROWS[50:])):
        written(tmp_path / f"{name}.csv", csv(rows))
    (tmp_path / "data").mkdir()
    for name in ("train_old", "test_labelled", "test-2", "data/train"):
        written(tmp_path / f"{name}.csv", csv(ROWS))
    found = load(tmp_path)
    assert {split: len(rows) for split, rows in found.splits.items()} == {"train": 40, "validation": 10, "test": 10}
    (tmp_path / "train.csv").rename(tmp_path / "train_set.csv")
    said = refusal(tmp_path)
    assert "train_old.csv" in said and "train_set.csv" in said and "expected one file" in said
    (tmp_path / "train_old.csv").unlink()
    assert len(load(tmp_path).splits["train"]) == 40
    written(tmp_path / "dev.csv", csv(ROWS))
    assert "validation" in refusal(tmp_path)


def test_parts_with_other_columns_are_refused(tmp_path):
    write_parquet(tmp_path / "train-00000.parquet", text=["a", "b"], label=[0, 1])
    write_parquet(tmp_path / "train-00001.parquet", sentence=["c", "d"], label=[0, 1])
    assert "same columns" in refusal(tmp_path)


def test_parts_with_headers_of_their_own_are_read(tmp_path):
    written(tmp_path / "train-0.csv", BASE)
    written(tmp_path / "train-1.csv", BASE.replace("text,label", "Review,Sentiment").replace("film", "story"))
    assert sum(len(rows) for rows in load(tmp_path).splits.values()) == 2 * len(ROWS)


def test_splits_of_a_hub_data_set_may_have_the_usual_short_names(monkeypatch):
    def rows(some):
        return datasets.Dataset.from_dict({"text": [text for text, _ in some], "label": [label for _, label in some]})

    splits = {"train": rows(ROWS[:40]), "dev": rows(ROWS[40:50]), "test": rows(ROWS[50:]), "more": rows(ROWS)}
    monkeypatch.setattr(datasets, "load_dataset", lambda _: splits)
    found = load_data("someone/something", None, None, 0)
    assert {split: len(found.splits[split]) for split in splits if split in found.splits} == {"train": 40, "test": 10}
    assert len(found.splits["validation"]) == 10
    splits["val"] = splits["dev"]
    assert "expected one validation split" in refusal("someone/something")


def test_words_that_look_like_nothing_are_texts(tmp_path):
    words = "NA null None nan N/A 0 true -1 1e5 a,b é漢🎬".split() + [" padded ", 'say "so"', "two\nlines"]
    quoted = ['"' + word.replace('"', '""') + '"' for word in words]
    found = load(written(tmp_path / "f.csv", BASE + "".join(f"{word},pos\n" for word in quoted)))
    assert pairs(found) == Counter(ROWS + [(word, "pos") for word in words])
    found = load(written(tmp_path / "plain.csv", BASE + "NA,pos\nnull,pos\nNone,neg\n7,neg\n"))
    assert pairs(found) == Counter([*ROWS, ("NA", "pos"), ("null", "pos"), ("None", "neg"), ("7", "neg")])


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    text = "one\u2028two\u0085three\x1cfour"
    line = f'{{"text": "{text}", "label": "pos"}}\n'.replace("\x1c", "\\u001c")
    assert pairs(load(written(tmp_path / "f.jsonl", JSONL + line)))[(text, "pos")] == 1


def test_a_line_of_a_megabyte_is_one_text(tmp_path):
    long = "word " * 220_000
    found = load(written(tmp_path / "f.csv", f"{BASE}{long},pos\n"))
    assert pairs(found)[(long, "pos")] == 1 and sum(pairs(found).values()) == 61


MISSING = {
    "f.csv": BASE + ",pos\n   ,pos\nno label,\nno label either,  \n",
    "nan.csv": NUMBERED + ",1\n \t,0\na,NaN\nb,\n",
    "f.jsonl": JSONL + '{"label":"pos"}\n{"text":null,"label":"pos"}\n{"text":"a"}\n{"text":"b","label":null}\n',
}


@pytest.mark.parametrize("name", MISSING)
def test_rows_without_text_or_label_are_dropped_and_counted(name, tmp_path):
    found = load(written(tmp_path / name, MISSING[name]))
    assert sum(pairs(found).values()) == 60 and len(found.label_names) == 2
    assert note(found, "dropped").startswith("train: dropped 4 of 64 rows: 2 without text, 2 without label")


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
    ("good", "bad", "names"),
    [
        ("true", "false", ("False", "True")),
        ("1", "0", ("0", "1")),
        ("1.0", "0.0", ("0", "1")),
        ('"1"', "0", ("0", "1")),
        ('"pos"', '"neg"', ("neg", "pos")),
        ("Infinity", "1", ("1", "inf")),  # then all are words
    ],
)
def test_labels_in_json(good, bad, names, tmp_path):
    found = load(written(tmp_path / "f.jsonl", JSONL.replace('"pos"', good).replace('"neg"', bad)))
    assert found.label_names == names
    assert pairs(found) == Counter((text, names[label == "pos"]) for text, label in ROWS)


def test_a_known_name_gives_its_numbers_their_names(tmp_path):
    (tmp_path / "ag_news").mkdir()
    written(tmp_path / "ag_news" / "train.csv", csv([(f"text {i}", i % 4) for i in range(80)]))
    assert load(tmp_path / "ag_news").label_names == ("World", "Sports", "Business", "Sci/Tech")


def test_a_class_missing_from_test_is_noted(tmp_path):
    written(tmp_path / "train.csv", BASE)
    written(tmp_path / "test.csv", "text,label\nnice,pos\n")
    assert "'neg'" in note(load(tmp_path), "warning: test has no row of")


def test_a_class_of_rows_without_text_is_no_class(tmp_path):
    assert load(written(tmp_path / "f.csv", BASE + ",n/a\n")).label_names == ("neg", "pos")


def test_minus_one_is_a_class_beside_others_and_missing_alone(tmp_path):
    signed = load(written(tmp_path / "signed.csv", BASE.replace(",neg", ",-1").replace(",pos", ",1") + "fine,-1.0\n"))
    assert signed.label_names == ("-1", "1") and pairs(signed)[("fine", "-1")] == 1
    assert note(signed, "-1 is taken for a class")
    written(tmp_path / "train.csv", NUMBERED)
    written(tmp_path / "test.csv", "text,label\nwho knows,-1\n")
    found = load(tmp_path)
    assert found.label_names == ("0", "1") and not note(found, "taken for a class")
    assert note(found, "dropped") == "test: dropped 1 of 1 rows: 0 without text, 1 without label"


def test_minus_one_is_what_train_says_it_is(tmp_path):
    """Beside words it is no class, in whatever form; a class of train's is one where a split has nothing else."""
    for name in ("words", "signed"):
        (tmp_path / name).mkdir()
    written(tmp_path / "words" / "train.csv", BASE)
    written(tmp_path / "words" / "test.csv", "text,label\nwho knows,-1\n")
    assert load(tmp_path / "words").label_names == ("neg", "pos")
    written(tmp_path / "signed" / "train.csv", BASE.replace(",neg", ",-1").replace(",pos", ",1"))
    written(tmp_path / "signed" / "test.csv", "text,label\nhorrid,-1\nbad,-1\n")
    signed = load(tmp_path / "signed")
    assert signed.label_names == ("-1", "1") and texts(signed, "test") == ["horrid", "bad"]


def test_a_file_called_as_a_known_data_set_has_its_class_names_and_says_so(tmp_path):
    found = load(written(tmp_path / "imdb.csv", NUMBERED))
    assert found.label_names == ("negative", "positive")
    assert note(found, "are taken for") == "the classes are taken for those of imdb: negative, positive"


def test_the_second_of_two_names_is_so_in_any_case(tmp_path):
    assert load(written(tmp_path / "f.csv", BASE.replace(",neg", ",bad").replace(",pos", ",Good"))).label_names == (
        "bad",
        "Good",
    )


def test_a_class_that_limit_leaves_out_is_told(tmp_path):
    rows = [(f"{label} {i}", label) for label in ("a", "b") for i in range(300)] + [(f"c {i}", "c") for i in range(4)]
    found = load(written(tmp_path / "f.csv", csv(rows)), limit=10)
    assert note(found, "--limit") == "warning: --limit 10 left no training row of the classes ['c']"


def test_a_text_of_many_copies_does_not_fill_what_is_held_out(tmp_path):
    rows = [(f"good film {i}", "pos") for i in range(700)] + [(f"bad film {i}", "neg") for i in range(700)]
    for word in "abcdefgh":  # by its hash, one of them would be among the first
        found = load(written(tmp_path / f"{word}.csv", csv(rows + [(f"{word} {word}", "pos")] * 300)))
        assert [len(rows) for rows in found.splits.values()] == pytest.approx([1370, 160, 170], abs=10)
        assert all(f"{word} {word}" not in texts(found, split) for split in ("validation", "test"))


# ---------------------------------------------------------------- what is refused

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
    "UTF-16": ("f.csv", BASE.encode("utf-16"), ["line 1", "UTF-8", "0xff", "iconv -f utf-16"]),
    "a picture": ("f.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ["line 1", "UTF-8", "0x89"]),
    "empty": ("f.csv", "", ["empty file"]),
    "empty JSON": ("f.jsonl", "\n\n", ["empty file"]),
    "only a BOM": ("f.csv", b"\xef\xbb\xbf", ["empty file"]),
    "header only": ("f.csv", "text,label\n", ["expected rows", "found none"]),
    "an empty list": ("f.json", "[]", ["expected rows", "found none"]),
    "fractions": ("f.csv", NUMBERED + "x,0.5\n", ["row 61", "whole number", "0.5"]),
    "two files in one": ("f.csv", BASE + BASE, [f"line {NEXT_LINE}", "one header"]),
    "quotes in a tsv": (
        "f.tsv",
        BASE.replace(",", "\t") + '"one\tpos\ntwo"\tneg\n',
        [f"line {NEXT_LINE}", "quotes are plain characters"],
    ),
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
    "CSV called JSON": ("f.jsonl", BASE, ["line 1", "expected JSON", "text,label"]),
    "CSV called parquet": ("f.parquet", BASE, ["expected a parquet file"]),
    "empty parquet": ("f.parquet", "", ["expected a parquet file"]),
    "unknown ending": ("f.xlsx", BASE, ["expected one file", ".csv", "f.xlsx"]),
}


def refusal(path: Path | str, limit: int | None = None) -> str:
    with pytest.raises(UserError) as refused:
        load_data(str(path), None, limit, 0)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    return str(refused.value)


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_refused_in_one_line(case, tmp_path, capfd):
    name, content, expected = REFUSED[case]
    said = refusal(written(tmp_path / name, content))
    assert str(tmp_path / name) in said
    assert all(part in said for part in expected), said
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""  # the libraries underneath say nothing of their own


@pytest.mark.parametrize(("train", "test"), [("01", "2"), ("01", "x"), (("neg", "pos"), ("neutral",))])
def test_a_class_that_train_lacks_is_refused(train, test, tmp_path):
    for split, labels in (("train", train), ("test", [*train, *test])):
        written(tmp_path / f"{split}.csv", csv([(f"{split} {i}", labels[i % len(labels)]) for i in range(30)]))
    said = refusal(tmp_path)
    assert f"{tmp_path} (test)" in said and f"found the classes ['{test[0]}']".replace("'2'", "2") in said
