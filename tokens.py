"""From texts to token ids: cut to the longest allowed, computed once, and read memory-mapped afterwards."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

import packaged
from data import TextData, TokenSplit
from progress import progress_bar

ROWS = 1000  # texts given to the tokenizer at a time
HEAD_SHARE = 0.25  # of what head_tail keeps; Sun et al. 2019 (arXiv 1905.05583) keep 128 and 382 of 510


@dataclass(frozen=True)
class Cutter:
    """Texts -> token ids, at most `max_length`: the first ones or, with head_tail, a quarter from the start and the
    rest from the end.

    What the tokenizer puts around a text (CLS, SEP) stays.
    """

    tokenizer: Any
    max_length: int
    truncation: str = "head"

    def __call__(self, texts: list[str]) -> tuple[list[list[int]], int]:
        """(ids of each text, how many texts were cut)."""
        rows = self.tokenizer(texts, truncation=False, padding=False)["input_ids"]
        cut = [number for number, ids in enumerate(rows) if len(ids) > self.max_length]
        if cut:
            before, behind = self._around()
        for number in cut:
            ids = rows[number]
            room = self.max_length - before - behind
            head = room if self.truncation == "head" else max(1, round(HEAD_SHARE * room))
            inner = ids[before : len(ids) - behind]
            kept = inner[:head] + inner[len(inner) - (room - head) :]
            rows[number] = ids[:before] + kept + ids[len(ids) - behind :]
        return rows, len(cut)

    def _around(self) -> tuple[int, int]:
        """How many special tokens stand before and behind a text."""
        mask = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        return mask.index(0), mask[::-1].index(0)

    @property
    def settings(self) -> str:
        """All that decides the ids of a text."""
        self.tokenizer("", truncation=False, padding=False)  # its first use changes its settings
        return f"{self.tokenizer.backend_tokenizer.to_str()}|{self.max_length}|{self.truncation}"


def tokenize(data: TextData, cutter: Cutter) -> tuple[dict[str, TokenSplit], list[str]]:
    """(every split's token ids, warnings of texts that were cut). Made once, then read from a file in the cache."""
    folder = packaged.cache_dir() / "tokens"
    done, notes = {}, []
    for name, rows in data.splits.items():
        key = hashlib.sha256((data.fingerprints[name] + cutter.settings).encode()).hexdigest()[:32]
        path = folder / f"{key}.ids"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lengths, cut = _read_lengths(path, len(rows)) or _fill(path, rows, cutter, name)
            ids = np.memmap(path, np.int32, "r")
        except OSError as error:
            raise packaged.unwritable("the tokenised texts", folder, error) from error
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        labels = np.asarray(rows["label"][:], np.int64)
        done[name] = TokenSplit(ids, labels, lengths, starts, cutter.tokenizer.pad_token_id, key)
        if cut:
            longer = f"longer than {cutter.max_length} tokens and were cut (--max_length, --truncation)"
            notes.append(f"warning: {name}: {cut} of {len(rows)} texts ({cut / len(rows):.1%}) are {longer}")
    return done, notes


def _read_lengths(path: Path, rows: int) -> tuple[np.ndarray, int] | None:
    """(tokens of each row, rows cut) where the ids at `path` are whole, else None."""
    try:
        found = np.load(path.with_suffix(".npy"))
        whole = len(found) == rows + 1 and path.stat().st_size == 4 * found[:-1].sum()
    except (OSError, ValueError, EOFError):
        return None
    return (found[:-1].astype(np.int32), int(found[-1])) if whole else None


def _fill(path: Path, rows: datasets.Dataset, cutter: Cutter, name: str) -> tuple[np.ndarray, int]:
    """Tokenise, write beside the place, rename when all is there. (Tokens of each row, rows cut)."""
    lengths, cut, bar = [], 0, progress_bar(len(rows), f"tokenising {name}")
    with bar, packaged.made_whole(path) as scratch, scratch.open("wb") as file:
        for some in rows.iter(ROWS):
            ids, more = cutter(some["text"])
            cut += more
            lengths += map(len, ids)
            file.write(np.concatenate(ids).astype(np.int32).tobytes())
            bar.update(len(ids))
    with packaged.made_whole(path.with_suffix(".npy")) as scratch, scratch.open("wb") as file:
        np.save(file, np.array([*lengths, cut], np.int64))
    return np.array(lengths, np.int32), cut
