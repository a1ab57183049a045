"""The frozen prefix: what layers that never change make of each text, computed once and read back every epoch.

With `--lora_layers K` the embeddings and all but the last K layers are frozen and run without dropout, so their output
for a text is the same in every epoch of every run. It is kept in the user's cache, in the precision it was computed in,
so that training from it is training without it, up to the rounding of products of another shape.
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import packaged
from data import TokenSplit, sorted_batches
from device import tokens_at_once
from progress import progress_bar

BATCH_SIZE = 64


class HiddenStates:
    """Hidden states of every token of a split, on disk one after the other: [tokens, D].

    Read with pread, not mapped: mapped pages would count as this process's memory.
    """

    def __init__(self, path: Path, lengths: np.ndarray, width: int, dtype: torch.dtype) -> None:
        self.file = path.open("rb")
        self.starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.width, self.dtype, self.buffer = width, dtype, torch.empty(0, dtype=dtype)

    def batch(self, indices: np.ndarray, length: int) -> Tensor:
        """The rows at `indices` [B], zeros behind each -> [B, length, D], which the next call overwrites.

        New memory for each of so many sizes left holes between them: 24 of 52 MB that a run with one layer took.
        """
        shape = len(indices), length, self.width
        if math.prod(shape) > len(self.buffer):
            self.buffer = torch.empty(math.prod(shape), dtype=self.dtype)
        hidden = self.buffer[: math.prod(shape)].view(shape).zero_()
        file, token = self.file.fileno(), self.width * self.dtype.itemsize
        memory = memoryview(hidden.view(-1).view(torch.uint8).numpy())
        starts, stops = (token * self.starts[indices]).tolist(), (token * self.starts[indices + 1]).tolist()
        for row, (start, stop) in enumerate(zip(starts, stops)):
            at = row * length * token
            os.preadv(file, [memory[at : at + stop - start]], start)
        return hidden


def with_prefix(
    splits: dict[str, TokenSplit],
    prefix: Callable[[Tensor, Tensor], Tensor],
    content: str,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, TokenSplit]:
    """`splits` with the output of `prefix` (ids [B, L], lengths [B] -> [B, L, D]) beside the token ids.

    `content` names weights, depth and precision: with a split's own key it decides which file is read or made.
    """
    folder = packaged.cache_dir() / "prefix"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, split in splits.items():
        path = folder / hashlib.sha256(f"{split.key}|{content}".encode()).hexdigest()[:32]
        if not path.exists() or path.stat().st_size != int(split.lengths.sum()) * width * dtype.itemsize:
            try:
                _fill(path, split, prefix, width * dtype.itemsize, device, name)
            except OSError as error:
                raise packaged.unwritable("the frozen layers' output", folder, error) from error
        found[name] = replace(split, hidden=HiddenStates(path, split.lengths, width, dtype))
    return found


def _fill(
    path: Path,
    split: TokenSplit,
    prefix: Callable[[Tensor, Tensor], Tensor],
    token_bytes: int,
    device: torch.device,
    name: str,
) -> None:
    """Compute in batches of like length, write each text to its place, rename when all are there."""
    starts = np.concatenate([[0], np.cumsum(split.lengths, dtype=np.int64)])
    bar = progress_bar(len(split), f"frozen layers, {name}")
    with bar, packaged.made_whole(path) as scratch, scratch.open("wb") as file:
        for indices in sorted_batches(split.lengths, BATCH_SIZE, tokens_at_once(device)):
            batch = split.batch(indices).to(device)
            hidden = prefix(batch.input_ids, batch.lengths).cpu()  # [B, L, D]
            rows = hidden.flatten(1).view(torch.uint8).numpy()  # [B, L * token_bytes]
            for row, start, stop in zip(rows, starts[indices].tolist(), starts[indices + 1].tolist()):
                os.pwrite(file.fileno(), row[: (stop - start) * token_bytes], start * token_bytes)
            bar.update(len(indices))
