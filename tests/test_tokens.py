"""From texts to token ids, kept in a cache, and from those to batches."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_data import BASE, load, written
from test_splits import shuffled_file

from config import UserError
from data import epoch_batches, epoch_steps, sorted_batches

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

    kinds = [("film good !", "pos"), ("bad film", "neg")]
    rows = [(" ".join([kinds[i % 2][0]] * (1 + i % 7) + [str(i)]), kinds[i % 2][1]) for i in range(60)]
    file = shuffled_file(tmp_path / "f.csv", rows, 0)
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
    for batches in (epoch_batches(LENGTHS[:n], size, 3, 1), list(sorted_batches(LENGTHS[:n], size, 8192))):
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
    ordered = [LENGTHS[batch].max() for batch in sorted_batches(LENGTHS, 16, 8192)]
    assert ordered == sorted(ordered, reverse=True)


def test_each_way_to_cut_has_ids_of_its_own(tiny_model):
    from transformers import AutoTokenizer

    from tokens import Cutter

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ways = [(8, "head"), (8, "head_tail"), (9, "head")]
    assert len({Cutter(tokenizer, *way).settings for way in ways}) == 3
