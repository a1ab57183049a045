"""Where data is looked for, how it is split and drawn, and that its fingerprint tells every change."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_data import BASE, ROWS, csv, load, note, pairs, refusal, texts, write_parquet, written

import data
import packaged
from config import UserError
from data import load_data


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


@pytest.mark.parametrize(
    "name", ["nowhere/f.csv", "nowhere.jsonl", "./nowhere", "/nowhere", "~nowhere", "x" * 5000 + ".csv"]
)
def test_what_is_not_there_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected a file, a folder or a data set's name, found nothing"):
        load_data(name, None, None, 0)
    with pytest.raises(UserError, match="--dataset_dir: expected a folder"):
        load_data(None, name, None, 0)


def test_known_names_are_the_hubs():
    assert {name: known.hub_id for name, known in data.KNOWN.items()} == {
        "rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes",
        "sst2": "stanfordnlp/sst2",
        "imdb": "stanfordnlp/imdb",
        "ag_news": "fancyzhx/ag_news",
    }


# ---------------------------------------------------------------- splits


def shuffled_file(path: Path, rows: list[tuple[str, str]], seed: int) -> Path:
    order = np.random.default_rng(seed).permutation(len(rows))
    return written(path, csv([rows[i] for i in order]))


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


def test_copies_that_differ_in_blanks_are_held_out_together(tmp_path):
    rows = [(f"text {i}{blank}", "pos" if i % 2 else "neg") for i in range(100) for blank in ("", " ")]
    found = load(written(tmp_path / "f.csv", csv(rows)))
    assert pairs(found) == Counter(rows) and not note(found, "leakage")
    found = load(written(tmp_path / "g.csv", csv([*rows, ("alone", "odd"), ("alone ", "odd")])))
    assert "odd" in {found.label_names[label] for label in found.splits["train"]["label"]}


def test_at_most_2000_rows_are_held_out(tmp_path):
    found = load(written(tmp_path / "f.csv", csv([(f"t{i}", i % 2) for i in range(30_000)])))
    assert len(found.splits["test"]) == len(found.splits["validation"]) == 2000


def test_rare_classes_are_never_held_out_whole(tmp_path):
    rows = [*ROWS, ("one", "rare"), *[("same", "copied")] * 5, ("two", "twice"), ("three", "twice")]
    found = load(shuffled_file(tmp_path / "f.csv", rows, 0))
    assert {found.label_names[label] for label in found.splits["train"]["label"]} == set(found.label_names)
    assert "rare" in note(found, "test has no row of")


def test_sst2_shape_its_labelled_validation_becomes_the_test_set(tmp_path):
    for split, n in (("train", 100), ("validation", 20), ("test", 10)):
        labels = [-1] * n if split == "test" else [i % 2 for i in range(n)]
        rows = {"sentence": [f"{split} {i}" for i in range(n)], "label": labels}
        write_parquet(tmp_path / f"{split}.parquet", ["negative", "positive"], **rows)
    found = load(tmp_path)
    assert texts(found, "test") == [f"validation {i}" for i in range(20)]
    assert [text.split()[0] for text in texts(found, "validation")] == ["train"] * 10
    assert found.label_names == ("negative", "positive")
    assert note(found, "test: dropped 10 of 10 rows") and note(found, "the validation split is the test set")


def test_texts_shared_between_splits_are_warned_of(tmp_path):
    written(tmp_path / "train.csv", BASE)
    written(tmp_path / "validation.csv", "text,label\ngood film 1,pos\nnew,neg\nnew too,neg\n")
    written(tmp_path / "test.csv", "text,label\n good film 2,pos\nbad film 1,pos\nnew,neg\nnewest,neg\n")
    found = load(tmp_path)
    assert note(found, "leakage: 1 of 3 validation texts are also in train")
    assert note(found, "leakage: 3 of 4 test texts are also in train or validation").startswith("warning: ")


def test_copies_and_classes_that_differ_in_case_are_warned_of(tmp_path):
    """Intervals count rows: three of each make them too narrow."""
    for split, rows in (("train", ROWS), ("validation", ROWS[:6]), ("test", ROWS[25:35] * 3)):
        written(tmp_path / f"{split}.csv", csv(rows))
    found = load(tmp_path)
    assert note(found, "20 of 30 test texts are copies").startswith("warning: ")
    assert not note(found, "validation texts are copies") and not note(found, "case")
    written(tmp_path / "train.csv", csv(ROWS) + f"another film,{ROWS[0][1].upper()}\n")
    assert note(load(tmp_path), "classes that differ in case").startswith("warning: ")


def test_limit_draws_at_random_from_rows_sorted_by_class(tmp_path):
    rows = [(f"text {i}", "pos" if i < 200 else "neg") for i in range(400)]
    file = written(tmp_path / "f.csv", csv(rows))
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
    for split, rows in (("train", ROWS), ("validation", ROWS[25:35]), ("test", ROWS[20:40])):
        written(tmp_path / f"{split}.csv", csv(rows))
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
