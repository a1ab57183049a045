"""From a data set's name, folder or file to labelled splits, and the batches drawn from their token ids."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch

import hub
import packaged
from config import DEFAULT_DATASET, UserError
from labels import class_names, missing_classes, number_classes
from readers import CHUNK, ENDINGS, USUAL, Columns, brief, choose_columns, read_file

SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLIT_NAMES |= {"dev": "validation", "test": "test"}
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 2000
POOL_BATCHES = 64


class Known(NamedTuple):
    hub_id: str
    label_names: tuple[str, ...]


_SENTIMENT = ("negative", "positive")
KNOWN = {
    "rotten_tomatoes": Known("cornell-movie-review-data/rotten_tomatoes", _SENTIMENT),
    "sst2": Known("stanfordnlp/sst2", _SENTIMENT),
    "imdb": Known("stanfordnlp/imdb", _SENTIMENT),
    "ag_news": Known("fancyzhx/ag_news", ("World", "Sports", "Business", "Sci/Tech")),
}


@dataclass(frozen=True)
class TextData:
    """Labelled texts. Each split has the columns `text` and `label` (0 .. classes-1) and no row without either."""

    name: str
    source: str  # where it came from, for the records
    kind: str  # "local", "hub" or "packaged"
    splits: dict[str, datasets.Dataset]  # train, validation, test
    label_names: tuple[str, ...]
    notes: tuple[str, ...]  # what was dropped or held out, in words
    text_column: str  # of the training rows, before it was renamed
    fingerprints: dict[str, str]  # SHA-256 of each split's texts and labels in order

    @property
    def num_classes(self) -> int:
        return len(self.label_names)


class Batch(NamedTuple):
    """B rows. If processes share a batch: its rows from `first` on, padded as the whole batch is."""

    input_ids: torch.Tensor  # [B, L] int64, padded on the right; [B, 0] beside `hidden`
    lengths: torch.Tensor  # [B] int64, tokens in each row
    labels: torch.Tensor  # [B] int64
    first: int  # place of row 0 in the whole batch
    whole: int  # rows of the whole batch
    hidden: torch.Tensor | None = None  # [B, L, D]: the frozen layers' output, where it is kept (prefix.py)

    @property
    def attention_mask(self) -> torch.Tensor:
        """[B, L] int64, 1 at tokens."""
        places = torch.arange(self.input_ids.shape[1], device=self.lengths.device)
        return (places < self.lengths[:, None]).long()

    def to(self, device: torch.device) -> "Batch":
        """From pinned memory to a GPU, which then need not be waited for."""
        if device.type == "cpu":
            return self

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        numbers = moved(torch.cat([self.input_ids.view(-1), self.lengths, self.labels]))  # one copy for three
        ids, lengths, labels = numbers.split([self.input_ids.numel(), len(self.lengths), len(self.labels)])
        hidden = None if self.hidden is None else moved(self.hidden)
        return Batch(ids.view_as(self.input_ids), lengths, labels, self.first, self.whole, hidden)


@dataclass(frozen=True)
class TokenSplit:
    """One tokenised split: memory-mapped token ids, labels, and lengths in tokens."""

    ids: np.ndarray  # [tokens] int32, the rows one after the other
    labels: np.ndarray  # [n] int64
    lengths: np.ndarray  # [n] int32
    starts: np.ndarray  # [n] int64: where a row begins in `ids`
    pad_id: int
    key: str  # of texts, labels, tokenizer and cut: the same key, the same token ids
    hidden: Any = None  # prefix.HiddenStates, where frozen layers are computed once

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray, start: int = 0, stop: int | None = None) -> Batch:
        """The rows at `indices[start:stop]`, padded to the longest of `indices`."""
        mine = indices[start:stop]
        lengths, longest = self.lengths[mine], int(self.lengths[indices].max())
        if self.hidden:
            hidden, ids = self.hidden.batch(mine, longest), np.empty((len(mine), 0), np.int64)
        else:
            hidden, ids = None, np.full((len(mine), longest), self.pad_id, np.int64)
            mask = np.arange(longest) < lengths[:, None]  # [B, L]
            ids[mask] = np.concatenate([self.ids[at : at + n] for at, n in zip(self.starts[mine], lengths)])
        tensors = (torch.from_numpy(array) for array in (ids, lengths.astype(np.int64), self.labels[mine]))
        return Batch(*tensors, start, len(indices), hidden)


def load_data(
    dataset: str | None,
    dataset_dir: str | None,
    limit: int | None,
    seed: int,
    columns: Columns = USUAL,
    from_package: bool = False,
) -> TextData:
    """Find, read and check a data set; `limit` keeps a seeded random draw of the training rows.

    columns: the text and the label column, where the user named them; from_package: the default is the packaged one,
    whatever the hub says.
    Raises UserError where it cannot be found or read.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, kind, source, raw = _read(dataset, dataset_dir, columns, from_package)
    known = KNOWN.get(name.removesuffix(" (packaged)"))
    notes: list[str] = []
    if "train" not in raw:
        raise UserError(f"{source}: expected a training split called train, found {brief(list(raw))}")
    text_column = raw["train"].column_names[0]
    splits = {split: _named(raw[split]) for split in ("train", "validation", "test") if split in raw}
    splits, label_names = number_classes(splits, source, known.label_names if known else (), notes)
    if known and label_names == known.label_names and kind == "local" and Path(source).is_file():
        notes.append(f"the classes are taken for those of {name}: {', '.join(label_names)}")
    splits = _three_splits(splits, source, notes)
    notes += missing_classes(splits, label_names) + _overlaps(splits)
    if limit is not None and limit < len(splits["train"]):
        chosen = np.random.default_rng(seed).permutation(len(splits["train"]))[:limit]
        splits["train"] = splits["train"].select(np.sort(chosen))
        drawn = np.unique(splits["train"]["label"][:])
        if len(drawn) < 2:
            raise UserError(f"--limit: expected enough rows to draw two classes, got {limit}")
        if lost := [name for number, name in enumerate(label_names) if number not in drawn]:
            notes.append(f"warning: --limit {limit} left no training row of the classes {brief(lost)}")
    fingerprints = {split: _fingerprint(rows) for split, rows in splits.items()}
    return TextData(name, source, kind, splits, label_names, tuple(notes), text_column, fingerprints)


def _fingerprint(rows: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for some in rows.iter(CHUNK):
        digest.update("\0".join(some["text"]).encode(errors="surrogatepass"))
        digest.update(np.asarray(some["label"], np.int64).tobytes())
    return digest.hexdigest()


def _read(
    dataset: str | None, dataset_dir: str | None, columns: Columns, from_package: bool
) -> tuple[str, str, str, dict[str, datasets.Dataset]]:
    """(name, kind, source, splits of a text and a label column): the user's files, else the hub, else the packaged
    default."""
    name = dataset or DEFAULT_DATASET
    if dataset_dir and not os.path.isdir(dataset_dir):  # noqa: PTH112 - never raises
        raise UserError(f"--dataset_dir: expected a folder, found none at {dataset_dir}")
    places = [Path(dataset_dir, name)] if dataset_dir else []
    places += [Path(name)] if dataset else []
    if local := next((place for place in places if os.path.exists(place)), None):  # noqa: PTH110 - never raises
        whole = local.resolve()
        return whole.stem if whole.is_file() else whole.name or "data", "local", str(local), _read_files(local, columns)
    if Path(name).suffix.lower() in ENDINGS or name.startswith((".", "/", "~")):
        raise UserError(f"--dataset: expected a file, a folder or a data set's name, found nothing at {name}")
    hub_id = KNOWN[name].hub_id if name in KNOWN else name
    if from_package:
        return _packaged_reviews(columns)
    try:
        raw = datasets.load_dataset(hub_id)
    except Exception as error:  # the hub's clients raise errors of many libraries, some of them no OSError
        if dataset is not None:
            advice = "give a local path, or leave --dataset out for the default"
            raise UserError(f"--dataset {name}: {hub.reason(error)}; {advice}") from error
        packaged.announce(packaged.REVIEWS_NAME, packaged.REVIEWS_WHEEL)
        return _packaged_reviews(columns)
    source = f"{hub.endpoint()}/datasets/{hub_id}"
    splits = {}
    for split in (split for split in raw if split in SPLIT_NAMES):
        if SPLIT_NAMES[split] in splits:
            raise UserError(f"{source}: expected one {SPLIT_NAMES[split]} split, found {brief(list(raw))}")
        chosen = choose_columns(raw[split].column_names, f"{source} ({split})", columns)
        splits[SPLIT_NAMES[split]] = raw[split].select_columns(list(chosen))
    return name, "hub", source, splits


def _packaged_reviews(columns: Columns) -> tuple[str, str, str, dict[str, datasets.Dataset]]:
    splits = _read_files(packaged.reviews_folder(), columns)
    return packaged.REVIEWS_NAME, "packaged", packaged.REVIEWS_WHEEL.requirement, splits


def _read_files(path: Path, columns: Columns) -> dict[str, datasets.Dataset]:
    """A file is one split called train; a folder holds files named after their splits, see `_split_files`."""
    try:
        seen = sorted(path.iterdir()) if path.is_dir() else [path]
        files = _split_files(seen) if path.is_dir() else {"train": [path]} if path.suffix.lower() in ENDINGS else {}
        if not files and (path / "data").is_dir():  # as in a clone of a hub repository
            path = path / "data"
            files = _split_files(seen := sorted(path.iterdir()))
    except OSError as error:
        raise UserError(f"--dataset {path}: cannot be read: {error.strerror}") from error
    endings = {file.suffix.lower() for some in files.values() for file in some}
    if "train" not in files or len(endings) != 1:
        expected = f"one file ({' '.join(ENDINGS)}) or a folder of train, validation and test files of one kind"
        raise UserError(f"--dataset {path}: expected {expected}, found {brief([file.name for file in seen])}")
    splits = {}
    for split, some in files.items():
        tables = [read_file(file, columns) for file in some]
        if endings != {".parquet"}:  # each part was read by its own header
            tables = [table.rename_columns(tables[0].column_names) for table in tables]
        if len(names := {tuple(table.column_names) for table in tables}) > 1:
            raise UserError(f"{path} ({split}): expected files with the same columns, found {brief(sorted(names))}")
        label = tables[0].column_names[1]
        named = {class_names(datasets.Features.from_arrow_schema(table.schema)[label]) for table in tables}
        if len(named) > 1:
            raise UserError(f"{path} ({split}): expected files with the same class names, found {brief(list(named))}")
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise UserError(f"{path} ({split}): expected files with the same columns: {brief(str(error))}") from error
        splits[split] = datasets.Dataset(table, fingerprint="unused")  # its own would hash every text
    return splits


def _split_files(seen: list[Path]) -> dict[str, list[Path]]:
    """The files of each split: the one that has its name (`test.csv`), else its numbered parts
    (`test-00000-of-00002.parquet`), else the one whose name begins so (`test_set.csv`).

    UserError where several could be meant: read together, they would count rows twice.
    """
    kinds: dict[str, dict[str, list[Path]]] = {}
    for file in seen:
        named = re.match(rf"({'|'.join(SPLIT_NAMES)})(?![a-z])(.*)", file.stem.lower())
        if named and file.suffix.lower() in ENDINGS:
            part = re.fullmatch(r"[-_.]?\d+([-_.]of[-_.]\d+)?(-[0-9a-f]+)?", named[2])
            kind = "named" if not named[2] else "numbered" if part else "begins so"
            kinds.setdefault(SPLIT_NAMES[named[1]], {}).setdefault(kind, []).append(file)
    found = {}
    for split, some in kinds.items():
        kind = next(kind for kind in ("named", "numbered", "begins so") if kind in some)
        if kind != "numbered" and len(some[kind]) > 1:
            raise UserError(
                f"{seen[0].parent} ({split}): expected one file, or numbered parts of one, found "
                f"{brief([file.name for file in some[kind]])}"
            )
        found[split] = some[kind]
    return found


def _named(rows: datasets.Dataset) -> datasets.Dataset:
    """The same two columns, called text and label, in this order."""
    return rows.rename_columns(
        {old: f"{new} " for old, new in zip(rows.column_names, ("text", "label"))}
    ).rename_columns({"text ": "text", "label ": "label"})


def _three_splits(splits: dict[str, datasets.Dataset], source: str, notes: list[str]) -> dict[str, datasets.Dataset]:
    """Complete train, validation and test. What is missing is held out of train by a fixed rule.

    A validation split without a test split becomes the test set (SST-2's test labels are not public).
    """
    classes = np.unique(splits["train"]["label"][:]).tolist()
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("no labelled test split: the validation split is the test set")
    for name in ("test", "validation"):
        if name not in splits:
            splits["train"], splits[name] = _hold_out(splits["train"])
            notes.append(f"{name}: {len(splits[name])} rows held out of train")
    all_there = classes == np.unique(splits["train"]["label"][:]).tolist()
    if not (all_there and len(splits["validation"]) and len(splits["test"])):
        raise UserError(f"{source} (train): expected enough rows of each class to hold some out, found too few")
    return {name: splits[name] for name in ("train", "validation", "test")}


def _overlaps(splits: dict[str, datasets.Dataset]) -> list[str]:
    """A warning for each split with texts that an earlier one has, which flatter the scores, or has twice: intervals
    count rows, and would be too narrow."""
    warnings = []
    _, earlier = _hashes(splits["train"])
    for split in ("validation", "test"):
        _, hashes = _hashes(splits[split])
        if copies := np.isin(hashes, earlier).sum():
            where = "train" if split == "validation" else "train or validation"
            warnings.append(f"warning: leakage: {copies} of {len(hashes)} {split} texts are also in {where}")
        if (copies := len(hashes) - len(np.unique(hashes))) > 0.02 * len(hashes):
            warnings.append(f"warning: {copies} of {len(hashes)} {split} texts are copies of others there")
        earlier = np.concatenate([earlier, hashes])
    return warnings


def _hashes(rows: datasets.Dataset) -> np.ndarray:
    """[2, n] uint64: the first 8 bytes of the SHA-256 of each text, and of it without the blanks around it. Texts
    themselves would fill the memory."""
    found = np.empty((2, len(rows)), np.uint64)
    for at, text in enumerate(text for some in rows.iter(CHUNK) for text in some["text"]):
        bare = text.strip()
        found[:, at] = _digest(bare)
        if text != bare:
            found[0, at] = _digest(text)
    return found


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _hold_out(rows: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(rest, held out): a tenth of each class, 2,000 rows in all at most, by the SHA-256 of the text.

    The rule knows neither the seed nor the order of the rows, so every run and every machine holds out the same
    texts; copies of a text have the same hash and stay together, and those that differ in the blanks around them go
    with them. A text that alone would be more than a tenth of what is held out comes last, so that no split is one
    sentence many times. No class is held out whole.
    """
    labels = np.asarray(rows["label"][:])
    hashes, blanks_aside = _hashes(rows)
    share = min(HELD_OUT_SHARE, HELD_OUT_MOST / len(rows))
    everything, uses = np.unique(hashes, return_counts=True)  # a text may be under several labels
    chosen = []
    for label in np.unique(labels):
        texts, copies = np.unique(hashes[labels == label], return_counts=True)
        wanted = max(1, round(share * copies.sum()))
        often = uses[np.searchsorted(everything, texts)] > max(1, wanted // 10)
        order = np.argsort(often, kind="stable")  # else by the hash
        before = np.cumsum(copies[order]) - copies[order]
        chosen.append(texts[order[before < wanted][: len(texts) - 1]])
    held_out = np.isin(hashes, np.concatenate(chosen))  # copies under another label, too
    alike = np.isin(blanks_aside, blanks_aside[held_out])
    whole = [label for label in np.unique(labels) if alike[labels == label].all()]
    held_out |= alike & ~np.isin(labels, whole)
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The row numbers of each batch of an epoch: a pure function of its arguments, so it needs no saving.

    The rows are shuffled, sorted by length within pools of 64 batches, cut into batches (the last may be
    short), and the batches are shuffled: little padding, and still a new draw every epoch.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    pool = batch_size * POOL_BATCHES
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    return [batches[number] for number in rng.permutation(len(batches))]


def epoch_steps(
    lengths: np.ndarray, batch_size: int, accumulation: int, seed: int, epoch: int
) -> Iterator[list[np.ndarray]]:
    """The row numbers of each optimiser step of an epoch: `accumulation` batches, fewer in the last."""
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    for start in range(0, len(batches), accumulation):
        yield batches[start : start + accumulation]


def sorted_batches(lengths: np.ndarray, batch_size: int, most_tokens: int) -> Iterator[np.ndarray]:
    """Every row once, longest first (so that memory runs out at once or never), in batches of like length.

    A batch has `batch_size` rows, fewer where they are so long that `most_tokens` would be exceeded.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + max(1, min(batch_size, most_tokens // int(lengths[order[start]])))
        yield order[start:stop]
        start = stop
