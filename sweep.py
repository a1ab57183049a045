"""Sweeps: every run of a grid, each as `python main.py` in a process of its own.

What is finished is found by its config.json, not by the name of its folder. So a sweep can be stopped at any time,
its file can grow, and the same command goes on: unfinished runs are resumed, failed ones tried again.
"""

import contextlib
import fcntl
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from config import DEFAULT_DATASET, Interrupted, TrainConfig, UserError, say
from grid import FLAGS, NOT_COMPUTED, OF_THE_SWEEP, cell_names, command_words, identity, read_grid
from pools import ForwardSignals, LocalPool, Pool, RayPool

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, and how far it is."""

    name: str
    config: TrainConfig
    folder: Path | None  # where it was begun
    finished: bool

    @property
    def state(self) -> str:
        return "done" if self.finished else "unfinished" if self.folder else "to do"


def sweep(config: TrainConfig) -> None:
    """Run what the grid lists and is not finished yet; with --dry_run, list it.

    Raises UserError if runs failed, Interrupted after Ctrl-C or SIGTERM.
    """
    file, outputs = Path(config.runs[0]), Path(config.output_dir)
    given = [name for name in config.given.split(",") if name in FLAGS and name not in OF_THE_SWEEP]
    beside = {name: getattr(config, name) for name in given}
    root = outputs / file.stem
    cells = find_cells(read_grid(file, beside), root)
    if config.dry_run:
        print(listing(cells, outputs, config.workers))
        return
    todo = [cell for cell in cells if not cell.finished]
    say(f"{len(cells)} runs, {len(cells) - len(todo)} of them done already; folders in {root}, output in {root}/logs")
    begun = sum(cell.folder is not None for cell in todo)
    if begun and (aside := [f"--{name}" for name in given if name in NOT_COMPUTED]):
        say(f"note: {begun} runs that were begun keep their own {' '.join(aside)}")
    (root / "logs").mkdir(parents=True, exist_ok=True)
    with _only_one(root) as lock:
        pool = RayPool(config.ray, config.workers) if config.ray else LocalPool(config.workers, lock)
        with pool, ForwardSignals(pool) as signals:
            failed = _run_all(todo, root, outputs, pool, signals)
    if signals.number:
        left = sum(not cell.finished for cell in find_cells([cell.config for cell in cells], root))
        message = f"stopped with {left} runs to go; the same command goes on (--sweep {file})"
        raise Interrupted(signals.number, message)
    for name, reason in failed:
        say(f"failed: {name}: {reason}")
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} runs failed; the same command tries them again")
    say(f"all {len(cells)} runs are done; python main.py --report {root}")


def find_cells(configs: list[TrainConfig], root: Path) -> list[SweepRun]:
    """Each config with its run folder in `root`, if there is one: a finished one, else the newest."""
    found: dict[tuple, Path] = {}
    files = sorted(root.glob("*/config.json"), key=lambda path: (_finished(path.parent), path.stat().st_mtime))
    for path in files:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found[identity(json.loads(path.read_text(encoding="utf-8"))["config"])] = path.parent
    cells = []
    for name, config in zip(cell_names([asdict(config) for config in configs]), configs):
        folder = found.get(identity(asdict(config)))
        finished = folder is not None and _finished(folder)
        if config.mode == "baseline" and not finished:
            folder = None  # it has nothing to go on with
        cells.append(SweepRun(f"{name} seed {config.seed}", config, folder, finished))
    return cells


def _finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


def listing(cells: list[SweepRun], outputs: Path, workers: int) -> str:
    """Markdown: each run with its state and the time its training takes, as far as older records tell."""
    estimate = Estimate(outputs, workers)
    lines = ["| run | state | training time |", "|---|---|---|"]
    for cell in cells:
        seconds = estimate(cell.config)
        lines.append(f"| {cell.name} | {cell.state} | {'unknown' if seconds is None else readable(seconds)} |")
    counts = ", ".join(
        f"{sum(cell.state == state for cell in cells)} {state}" for state in ("done", "unfinished", "to do")
    )
    return "\n".join([*lines, "", f"{len(cells)} runs: {counts}; {estimate.left(cells, workers)}"])


class Estimate:
    """How long a run trains: its rows by the rate of the newest finished run of the same kind, start and scoring aside.

    The rates are those of whatever machine made the records, shared by `workers` runs at once.
    """

    def __init__(self, outputs: Path, workers: int) -> None:
        files = [*outputs.glob("*/result.json"), *outputs.glob("*/*/result.json")]
        self.paces: list[tuple[tuple, str, int | None, float]] = []  # kind, data set, its rows if all, samples/s
        for path in sorted(files, key=lambda path: path.stat().st_mtime):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # another program's result.json
                record = json.loads(path.read_text(encoding="utf-8"))
                old, rows = record["config"], record["data"]["rows"]["train"]
                kind = record["method"], old["model"], old.get("lora_layers")
                data, whole = old["dataset"] or DEFAULT_DATASET, rows if old["limit"] is None else None
                shared = re.search(r"(\d+) runs at once", record["device"])
                rate = record["samples_per_second"] * (int(shared[1]) if shared else 1) / workers
                self.paces.append((kind, data, whole, rate))

    def __call__(self, config: TrainConfig) -> float | None:
        """Seconds, or None if no record tells."""
        wanted, data = (config.method, config.model, config.lora_layers), config.dataset or DEFAULT_DATASET
        alike, rows = [], config.limit
        for kind, trained_on, whole, rate in self.paces:
            if trained_on == data and whole is not None:
                rows = min(config.limit or math.inf, whole)
            if kind == wanted:
                alike.append((trained_on == data, rate))
        if not alike or rows is None:
            return None
        rate = max(reversed(alike), key=lambda one: one[0])[1]  # the newest, of the same data if there is one
        return rows * (1 if config.mode == "baseline" else config.epochs) / rate

    def left(self, cells: list[SweepRun], at_once: int) -> str:
        """The training time of what is not finished, in words."""
        seconds = [self(cell.config) for cell in cells if not cell.finished]
        if not seconds:
            return "nothing left to train"
        known = [value for value in seconds if value is not None]
        if len(known) < len(seconds):
            unknown = f"unknown for {len(seconds) - len(known)} of {len(seconds)} runs"
            rest = f", {readable(sum(known) / at_once)} for the rest" if known else ""
            return f"training time left {unknown}{rest}"
        return f"about {readable(sum(known) / at_once)} of training left"


def readable(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _run_all(
    todo: list[SweepRun], root: Path, outputs: Path, pool: Pool, signals: ForwardSignals
) -> list[tuple[str, str]]:
    """Run the cells, say after each how far the sweep is. Returns (name, reason) of those that failed."""
    futures, failed = {}, []
    for cell in todo:
        log = root / "logs" / f"{re.sub(r'[^A-Za-z0-9.=-]+', '-', cell.name)}.log"
        words = ["--resume", str(cell.folder)] if cell.folder else command_words(cell.config)
        words += [] if cell.folder else [f"--output_dir={root}"]
        futures[pool.submit([str(ROOT / "main.py"), *words], log)] = (cell, log)
    for done, future in enumerate(as_completed(futures), 1):
        cell, log = futures[future]
        if signals.number:
            continue
        error = future.exception()
        (now,) = find_cells([cell.config], root)
        if not now.finished:
            reason = str(error) if error else f"exit code {future.result()}: {_last_line(log)} ({log})"
            if cell.folder:
                reason += f"; to begin it anew, delete {cell.folder}"
            failed.append((cell.name, " ".join(reason.split())))
        left = [futures[other][0] for other in futures if not other.done()]
        result = "failed" if not now.finished else _one_line_result(now.folder)
        say(f"[{done}/{len(todo)}] {cell.name}: {result}; {Estimate(outputs, pool.workers).left(left, pool.at_once)}")
    return failed


def _one_line_result(folder: Path) -> str:
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return f"validation accuracy {record['val']['accuracy']:.4f}, {readable(record['train_seconds'])} of training"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "no output"
    return lines[-1] if lines else "no output"


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[int]:
    """Holds `root`'s lock; yields its file descriptor. UserError where another sweep, or a run it left, has it."""
    handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"--sweep: another sweep is at work in {root}") from error
    else:
        yield handle
    finally:
        os.close(handle)
