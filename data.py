"""From a data set's name, folder or file to token ids, and the batches drawn from them."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

import hub
import packaged
from config import DEFAULT_DATASET, UserError

TEXT_COLUMNS = ("text", "sentence", "review", "content", "tweet", "comment", "body")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "target")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLIT_NAMES |= {"dev": "validation", "test": "test"}
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # keep_default_na: a review that reads "NA" or "null" is a text, not a missing value
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
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

    fingerprints: dict[str, str]  # SHA-256 of each split's texts and labels in order

    @property
    def num_classes(self) -> int:
        return len(self.label_names)


class Batch(NamedTuple):
    input_ids: torch.Tensor  # [B, L] int64, padded on the right to the longest of the batch
    attention_mask: torch.Tensor  # [B, L] int64, 1 at tokens
    labels: torch.Tensor  # [B] int64


@dataclass(frozen=True)
class TokenSplit:
    """One tokenised split: memory-mapped token ids, labels, and lengths in tokens."""

    rows: datasets.Dataset  # column input_ids
    labels: np.ndarray  # [n] int64
    lengths: np.ndarray  # [n] int32
    pad_id: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> Batch:
        """The rows at `indices` [B], padded to their longest."""
        column = self.rows[indices.tolist()].column("input_ids").combine_chunks()
        lengths = self.lengths[indices]
        mask = np.arange(lengths.max()) < lengths[:, None]  # [B, L]
        ids = np.full(mask.shape, self.pad_id, np.int64)
        ids[mask] = column.flatten().to_numpy()
        return Batch(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), self.labels_at(indices))

    def labels_at(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.labels[indices])


def load_data(dataset: str | None, dataset_dir: str | None, limit: int | None, seed: int) -> TextData:
    """Find, read and check a data set; `limit` keeps a seeded random draw of the training rows.

    Raises UserError where it cannot be found or read.
    """
    name, kind, source, raw = _read(dataset, dataset_dir)
    known = KNOWN.get(name.removesuffix(" (packaged)"))
    notes: list[str] = []
    splits = {split: _two_columns(rows, source, split) for split, rows in raw.items()}
    splits, label_names = _with_class_ids(splits, source, known, notes)
    splits = _three_splits(splits, source, notes)
    if limit is not None and limit < len(splits["train"]):
        chosen = np.random.default_rng(seed).permutation(len(splits["train"]))[:limit]
        splits["train"] = splits["train"].select(np.sort(chosen))
    fingerprints = {split: _fingerprint(rows) for split, rows in splits.items()}
    return TextData(name, source, kind, splits, label_names, tuple(notes), fingerprints)


def _fingerprint(rows: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for some in rows.iter(10_000):
        digest.update("\0".join(some["text"]).encode(errors="surrogatepass"))
        digest.update(np.asarray(some["label"], np.int64).tobytes())
    return digest.hexdigest()


def _read(dataset: str | None, dataset_dir: str | None) -> tuple[str, str, str, dict[str, datasets.Dataset]]:
    """(name, kind, source, raw splits), looked for as DESIGN says: the user's files, the hub, the packaged default."""
    name = dataset or DEFAULT_DATASET
    local = Path(dataset_dir) / name if dataset_dir and not Path(name).exists() else Path(name)
    if dataset and local.exists() or dataset_dir and local.is_dir():
        return local.resolve().name.split(".")[0], "local", str(local), _read_files(local)
    if Path(name).suffix in READERS or name.startswith((".", "/", "~")):
        raise UserError(f"--dataset: no such file or folder: {name}")
    hub_id = KNOWN[name].hub_id if name in KNOWN else name
    try:
        raw = datasets.load_dataset(hub_id)
    except Exception as error:  # the hub's clients raise errors of many libraries, some of them no OSError
        if dataset is None:
            return (
                packaged.REVIEWS_NAME,
                "packaged",
                packaged.REVIEWS_WHEEL.requirement,
                _read_files(packaged.reviews_folder()),
            )
        raise UserError(_hub_failure("dataset", name, error)) from error
    return name, "hub", f"{hub.endpoint()}/datasets/{hub_id}", dict(raw)


def _hub_failure(what: str, name: str, error: Exception) -> str:
    if hub.offline():
        reason = f"the hub ({hub.endpoint()}) cannot be reached and it is not in the local cache"
    else:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"--{what} {name}: {reason}; give a local path, or leave --{what} out for the default"


def _read_files(path: Path) -> dict[str, datasets.Dataset]:
    """A file is one split called train; a folder holds files named after their splits."""
    files: dict[str, list[str]] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        split = re.match(r"(?:train|validation|valid|val|dev|test)(?![a-z])", file.name.lower())
        if file.suffix in READERS and (split or file == path):
            files.setdefault(SPLIT_NAMES[split[0]] if split and file != path else "train", []).append(str(file))
    endings = {Path(name).suffix for names in files.values() for name in names}
    if "train" not in files or len(endings) != 1:
        expected = "train, validation and test files of one kind, such as train.csv, or one file"
        raise UserError(f"--dataset {path}: expected {expected} ({' '.join(READERS)})")
    reader, options = READERS[endings.pop()]
    try:
        return dict(datasets.load_dataset(reader, data_files=files, **options))
    except Exception as error:  # pandas, pyarrow and datasets each raise their own
        reason = str(error.__cause__ or error).strip().splitlines()
        raise UserError(f"--dataset {path}: cannot be read: {reason[0] if reason else error!r}") from error


def _two_columns(rows: datasets.Dataset, source: str, split: str) -> datasets.Dataset:
    """Only the text and the label column, under those names."""
    chosen = {}
    for wanted, names in (("text", TEXT_COLUMNS), ("label", LABEL_COLUMNS)):
        column = next((name for name in names if name in rows.column_names), None)
        if column is None:
            raise UserError(f"{source} ({split}): expected a column {' or '.join(names)}, found {rows.column_names}")
        chosen[column] = wanted
    return rows.select_columns(list(chosen)).rename_columns({k: v for k, v in chosen.items() if k != v})


def _with_class_ids(
    splits: dict[str, datasets.Dataset], source: str, known: Known | None, notes: list[str]
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...]]:
    """Drop rows without text or label, and number the classes 0 .. n-1 in the order of their names.

    Integer labels keep their order; -1 is the hub's mark for 'not published' and counts as missing.
    """
    feature = splits["train"].features["label"]
    kept = {}
    for split, rows in splits.items():
        text, label = rows.data.column("text"), rows.data.column("label")
        ok = pc.and_(pc.is_valid(label), pc.is_valid(text))
        ok = pc.and_(ok, pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(text, ""))), 0))
        if pa.types.is_integer(label.type):
            ok = pc.and_(ok, pc.greater_equal(pc.fill_null(label, -1), 0))
        found = np.flatnonzero(ok.to_numpy())
        if len(found) < len(rows):
            notes.append(f"{split}: {len(rows) - len(found)} of {len(rows)} rows have no text or no label: dropped")
            rows = rows.select(found)
        if len(rows):
            kept[split] = rows
    if "train" not in kept:
        raise UserError(f"{source}: the training split has no row with a text and a label")
    values = sorted(set().union(*(rows.unique("label") for rows in kept.values())))
    if isinstance(feature, datasets.ClassLabel):
        return kept, tuple(feature.names)
    if len(values) < 2:
        raise UserError(f"{source}: expected at least two classes, found only {values}")
    ids = {value: number for number, value in enumerate(values)}
    if values != list(range(len(values))):
        column = datasets.Value("int64")
        features = datasets.Features({"text": datasets.Value("string"), "label": column})
        kept = {
            split: rows.map(
                lambda batch: {"label": [ids[value] for value in batch["label"]]},
                batched=True,
                features=features,
                desc="numbering the classes",
            )
            for split, rows in kept.items()
        }
    readable = known.label_names if known and values == list(range(len(known.label_names))) else map(str, values)
    return kept, tuple(readable)


def _three_splits(splits: dict[str, datasets.Dataset], source: str, notes: list[str]) -> dict[str, datasets.Dataset]:
    """Complete train, validation and test. What is missing is held out of train by a fixed rule.

    A validation split without a test split becomes the test set (SST-2's test labels are not public).
    """
    splits = {name: rows for name, rows in splits.items() if name in ("train", "validation", "test")}
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
        notes.append("no labelled test split: the validation split is the test set")
    for name in ("test", "validation"):
        if name not in splits:
            splits["train"], splits[name] = _hold_out(splits["train"])
            notes.append(f"{name}: {len(splits[name])} rows held out of train")
    if not len(splits["train"]) or not len(splits["validation"]) or not len(splits["test"]):
        raise UserError(f"{source}: too few rows to hold out validation and test rows")
    return {name: splits[name] for name in ("train", "validation", "test")}


def _hold_out(rows: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(rest, held out): a tenth of each class, 2,000 rows in all at most, by the SHA-256 of the text.

    The rule knows neither the seed nor the order of the rows, so every run and every machine holds out the same
    texts; copies of a text have the same hash and stay together.
    """
    labels = np.asarray(rows["label"])
    hashes = np.array([hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8] for text in rows["text"]])
    share = min(HELD_OUT_SHARE, HELD_OUT_MOST / len(rows))
    held_out = np.zeros(len(rows), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        last = np.sort(hashes[members])[max(1, round(share * len(members))) - 1]
        held_out[members] = hashes[members] <= last
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def tokenize(data: TextData, tokenizer: Any, max_length: int) -> dict[str, TokenSplit]:
    """Token ids of every split, made once, then read memory-mapped from a file named after what is in it."""
    tokenizer("", truncation=True, max_length=max_length)  # its first use changes its settings, so: use, then read
    settings = tokenizer.backend_tokenizer.to_str()
    folder = packaged.cache_dir() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        ids = tokenizer(rows["text"], truncation=True, max_length=max_length)["input_ids"]
        return {"input_ids": ids, "length": [len(row) for row in ids]}

    done = {}
    for name, rows in data.splits.items():
        key = hashlib.sha256((data.fingerprints[name] + settings).encode()).hexdigest()[:32]
        encoded = rows.map(
            encode,
            batched=True,
            remove_columns=["text"],
            new_fingerprint=key,  # datasets' own would miss: a fast tokenizer changes when it is used
            cache_file_name=str(folder / f"{key}.arrow"),
            load_from_cache_file=True,
            desc=f"tokenising {name}",
        )
        columns = {key: encoded.data.column(key).to_numpy() for key in ("label", "length")}
        done[name] = TokenSplit(
            encoded.select_columns(["input_ids"]).with_format("arrow"),
            columns["label"].astype(np.int64),
            columns["length"].astype(np.int32),
            tokenizer.pad_token_id,
        )
    return done


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


def sorted_batches(lengths: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Every row once, longest first (so that memory runs out at once or never), in batches of like length."""
    order = np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
