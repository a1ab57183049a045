"""Checkpoints: on disk whole or not at all, and checked before they are believed.

A checkpoint is one nested dict of tensors and plain values. It is written to a folder beside its place, flushed to
the disk, and renamed; a manifest with the SHA-256 of its files tells a whole one. Nothing is pickled.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import Interrupted, UserError, say
from device import wait_for_everyone
from packaged import flush

KEEP = 2  # the newest, and one to fall back on
SHORTEST_INTERVAL_S, COST_SHARE = 60.0, 0.01
TENSORS, VALUES, MANIFEST = "tensors.safetensors", "values.json", "manifest.json"


class DamagedError(Exception):
    """A checkpoint that is not as it was written; the message names file and fault."""


class GracefulStop:
    """Ctrl-C and SIGTERM between `open_loop` and `close_loop` are noted, for the loop to finish its step.

    A second one, or the first outside the loop, where there is no step to finish, ends the run at once.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.number, self.in_loop = run_dir, 0, False

    def __enter__(self) -> "GracefulStop":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, _: Any) -> None:
        if self.number or not self.in_loop:
            raise self.interrupted(number, "at once")
        self.number = number
        with contextlib.suppress(OSError):  # Ctrl-C ends `tee`, too
            os.write(2, b"stopping after this step; once more to stop at once\n")  # print may be busy just now

    def open_loop(self) -> None:
        self.in_loop = True

    def close_loop(self) -> None:
        """Training is over. What came too late for its last step counts now."""
        self.in_loop = False
        if self.number:
            raise self.interrupted(self.number, "after the last step")

    def interrupted(self, number: int, where: str) -> Interrupted:
        resume = f"python main.py --resume {shlex.quote(str(self.run_dir))}"
        return Interrupted(number, f"stopped {where}; to go on: {resume}")

    def asked(self, accelerator: Accelerator) -> int:
        """The number of the signal that came to any process, or 0."""
        if accelerator.num_processes == 1:
            return self.number
        return int(accelerator.gather(torch.tensor([self.number], device=accelerator.device)).max())

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Checkpoints:
    """The checkpoints of one run: when the next is due, saved by the main process alone."""

    def __init__(self, root: Path, every: int | None, accelerator: Accelerator) -> None:
        self.root, self.every, self.accelerator = root, every, accelerator
        self.saved_at, self.cost = time.monotonic(), 0.0

    def due(self, step: int) -> bool:
        """Every `every` steps; else by time, so seldom that saving takes about 1% of it, and 60 s apart."""
        if self.every:
            return step % self.every == 0
        interval = max(SHORTEST_INTERVAL_S, self.cost / COST_SHARE)
        due = time.monotonic() - self.saved_at > interval
        if self.accelerator.num_processes > 1:  # clocks differ: the main process decides
            due = bool(broadcast_object_list([due])[0])
        return due

    def save(self, step: int, state: dict[str, Any]) -> None:
        """UserError if it cannot be written; the one before is still there then."""
        started = time.monotonic()
        try:
            if self.accelerator.is_main_process:
                save(self.root, step, state)
        except (OSError, SafetensorError) as error:
            raise UserError(f"the checkpoint of step {step} cannot be written to {self.root}: {error}") from error
        wait_for_everyone(self.accelerator)
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - started

    def clear(self) -> None:
        """Drop them all: a finished run has its model."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.root, ignore_errors=True)


def save(root: Path, step: int, state: dict[str, Any]) -> None:
    """Write `state` as `root/step-<step>` and drop all but the newest checkpoints. OSError if the disk is full."""
    tensors: dict[str, torch.Tensor] = {}
    values = _pack(state, tensors, "")
    folder, scratch = root / f"step-{step}", root / f".step-{step}.tmp"
    for leftover in (*root.glob(".step-*.tmp"), folder):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch.mkdir(parents=True)
    save_file(tensors, scratch / TENSORS)
    (scratch / VALUES).write_text(json.dumps(values))
    hashes = {name: _sha256(scratch / name) for name in (TENSORS, VALUES)}
    (scratch / MANIFEST).write_text(json.dumps(hashes, indent=2))
    for path in (*scratch.iterdir(), scratch):
        flush(path)
    scratch.rename(folder)
    flush(root)
    whole = [path for path in _by_age(root) if _step(path) <= step]  # those of later steps were damaged
    for old in {*_by_age(root)} - {*whole[:KEEP]}:
        shutil.rmtree(old)


def load(folder: Path) -> dict[str, Any]:
    """The dict given to `save`, tensors on the CPU. Raises DamagedError where anything differs from the manifest."""
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        if text != json.dumps(manifest, indent=2):
            raise DamagedError(f"{folder / MANIFEST} is not as it was written")
        for name in (TENSORS, VALUES):
            if _sha256(folder / name) != manifest[name]:
                raise DamagedError(f"{folder / name} is not as it was written")
        values = json.loads((folder / VALUES).read_text())
        return _unpack(values, load_file(folder / TENSORS))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedError(f"{folder}: {error}") from error


def newest_whole(root: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is as it was written; a warning for each damaged one; None if there is none.

    Raises UserError if all are damaged. Nothing is deleted.
    """
    folders = _by_age(root)
    for folder in folders:
        try:
            return load(folder)
        except DamagedError as error:
            say(f"warning: damaged checkpoint, using the one before: {error}")
    if folders:
        raise UserError(f"every checkpoint in {root} is damaged; start a new run")
    return None


def _by_age(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in root.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name[5:])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pack(value: Any, tensors: dict[str, torch.Tensor], path: str) -> Any:
    """`value` as JSON can hold it, with its tensors moved to `tensors` under their paths."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):  # as pairs, since JSON would turn whole-number keys into text
        return {"dict": [[key, _pack(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_pack(item, tensors, f"{path}/{number}") for number, item in enumerate(value)]}
    return value


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {key: _unpack(item, tensors) for key, item in value["dict"]}
    return [_unpack(item, tensors) for item in value["list"]]
