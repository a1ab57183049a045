"""The shared logger: metrics.jsonl, the console, Weights & Biases and Comet behind `log`, `log_config`, `close`.

This is the training side. `metrics.jsonl` is the truth. A tracker is a copy of it, made by a process of its own
(tracker_process.py) that reads metrics.jsonl as it grows. So a tracker that refuses, fails or hangs cannot slow or
break the run: at the end it is killed, and `sync` rebuilds its copy from the same file with the same code. It also
keeps the trackers' import hooks, signal and exit handlers out of training, and finishes the copy in order even if
training is killed. wandb and comet_ml are imported in those processes alone.
"""

import contextlib
import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

from config import TrainConfig, UserError, say

FINISH_SECONDS = 15.0  # for W&B's last uploads, within CLOSE_SECONDS
CLOSE_SECONDS = 28.0  # that `close` waits, for all trackers together, before it kills them
SYNC_SECONDS = 600.0  # that `sync` waits for one tracker
TITLES = {"wandb": "W&B", "comet": "Comet"}
PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}
PROGRAM = Path(__file__).resolve().with_name("tracker_process.py")
EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}


class Spec(TypedDict):
    """What a tracker process is told when it starts, as JSON in its one argument."""

    tracker: str  # "wandb" or "comet"
    run_dir: str
    project: str
    run_name: str
    resume: bool  # continue the copy that run_dir/TRACKER/state.json names
    sync: bool  # online or not at all
    needs_key: bool  # record nothing where no API key is configured
    limit: float  # seconds it has, once told to close
    finish_limit: float  # seconds of these that W&B's own finish may take


class Logger(Protocol):
    """What training sees of tracking."""

    def log(self, values: Mapping[str, float], *, step: int, epoch: float) -> None:
        """Record `values` (such as "train/loss") at optimiser step `step`, `epoch` epochs into training."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Give the trackers the run's settings. Writes no file: config.json is its caller's."""

    def close(self, status: str = "finished") -> None:
        """End the run as "finished", "failed" or "interrupted"; returns within 30 seconds."""


class NullLogger:
    """A logger that does nothing, for every process but the main one."""

    def log(self, values: Mapping[str, float], *, step: int, epoch: float) -> None: ...

    def log_config(self, config: Mapping[str, Any]) -> None: ...

    def close(self, status: str = "finished") -> None: ...


class RunLogger:
    """Writes metrics.jsonl and the console itself, and passes orders to the tracker processes."""

    def __init__(self, path: Path, trackers: "list[_Tracker]") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = trackers
        for tracker in trackers:
            tracker.start()

    def log(self, values: Mapping[str, float], *, step: int, epoch: float) -> None:
        """See Logger. Not-a-number and infinity are written as the strings "NaN", "Infinity" and "-Infinity", which
        keeps the line valid JSON and which `float` reads back. Raises ValueError for what is not one number, and
        UserError where the disk is full."""
        numbers = {key: _number(key, value) for key, value in values.items()}
        row = {"step": int(step), "epoch": _number("epoch", epoch), "time": time.time(), **numbers}
        line = json.dumps({key: _json_number(value) for key, value in row.items()}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            what = f"{self._file.name}: the line of step {row['step']} cannot be written: {error.strerror}"
            raise UserError(f"{what}; the run ends here, with its last checkpoint") from error
        # With a terminal the progress bar shows the training loss; a batch job's log wants it line by line.
        shown = ("val/", "test/") if sys.stderr.isatty() else ("val/", "test/", "train/")
        parts = [f"{key} {_readable(value)}" for key, value in numbers.items() if key.startswith(shown)]
        if parts:
            _say("  ".join([f"step {row['step']}", f"epoch {row['epoch']:.2f}", *parts]))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """See Logger. What JSON has no form for (paths, dtypes) is sent as its `str`."""
        for tracker in self._trackers:
            tracker.send({"config": dict(config)})

    def close(self, status: str = "finished") -> None:
        """See Logger. A second call does nothing. Raises ValueError for an unknown status."""
        if status not in EXIT_CODES:
            raise ValueError(f"status must be one of {', '.join(EXIT_CODES)}, not {status!r}")
        if self._file.closed:
            return
        with contextlib.suppress(OSError):  # of a line that could not be written, which `log` has said
            self._file.close()
        for tracker in self._trackers:
            tracker.send({"close": status})
        deadline = time.monotonic() + CLOSE_SECONDS
        for tracker in self._trackers:
            tracker.wait(deadline)


def open_logger(
    run_dir: Path, *, wandb: bool = False, comet: bool | None = None, project: str, run_name: str, resume: bool = False
) -> RunLogger:
    """Open the main process's logger (other processes use `NullLogger`). Returns at once: the trackers start beside
    training and catch up.

    `comet=None` means: where a Comet API key is configured. `resume` appends to metrics.jsonl and continues the runs
    the trackers hold online; an offline copy is always a new and whole one. Raises UserError if metrics.jsonl is
    there and `resume` is not set.
    """
    path = Path(run_dir).resolve() / "metrics.jsonl"
    if path.exists() and not resume:
        raise UserError(f"{path} exists already: resume that run or choose another folder")
    on = {"wandb": wandb, "comet": _comet_may_be_configured() if comet is None else comet}
    given: Any = {
        "run_dir": str(path.parent),
        "project": project,
        "run_name": run_name,
        "resume": resume,
        "sync": False,
        "needs_key": comet is None,
        "limit": CLOSE_SECONDS,
        "finish_limit": FINISH_SECONDS,
    }
    return RunLogger(path, [_Tracker({"tracker": name, **given}, _say) for name in _installed(on, _say)])


def sync(run_dir: Path, *, wandb: bool = False, comet: bool | None = None) -> list[str]:
    """Rebuild a run's online copies from metrics.jsonl and config.json, with the original steps and times.

    A tracker is on if the run was recorded with it, or as `wandb` and `comet` say. A copy known to hold everything is
    left alone; one known to hold the beginning is completed; else a new run is made. Waits up to `SYNC_SECONDS` for
    each. Returns lines to print. Raises UserError if `run_dir` is not a run, no tracker is on, or the run or another
    `sync` of it is still at work: two at once would make two copies.
    """
    from filelock import FileLock, Timeout

    run_dir = Path(run_dir).resolve()
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir} has no metrics.jsonl, so there is nothing to sync")
    try:
        record = read_json(run_dir / "config.json")
        states = {name: read_json(run_dir / name / "state.json") for name in TITLES}
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir}: a record cannot be read: {error}") from error
    config = record.get("config", {}) if isinstance(record, dict) else None
    if not isinstance(config, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise UserError(f"{run_dir}: config.json or a tracker's state.json: expected a JSON object, found none")
    recorded = {name: bool(config.get(name) or states[name]) for name in TITLES}
    on = {"wandb": wandb or recorded["wandb"], "comet": recorded["comet"] if comet is None else comet}
    if not any(on.values()):
        raise UserError(f"{run_dir} was recorded without a tracker: choose with --wandb or --comet where to upload it")
    lock = FileLock(run_dir / ".lock", blocking=False)  # the run's own (runs.open_run)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{run_dir}: a process is still at work on this run") from None
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written: {error.strerror or error}") from error
    try:
        return _sync_each(run_dir, record, states, on)
    finally:
        (run_dir / ".lock").unlink(missing_ok=True)
        lock.release()


def _sync_each(run_dir: Path, record: dict[str, Any], states: dict[str, Any], on: dict[str, bool]) -> list[str]:
    config = record.get("config", {})
    lines: list[str] = []
    for name in _installed(on, lines.append):
        spec: Spec = {
            "tracker": name,
            "run_dir": str(run_dir),
            "project": states[name].get("project", config.get("project", TrainConfig.project)),
            "run_name": states[name].get("run_name", run_dir.name),
            "resume": True,
            "sync": True,
            "needs_key": False,
            "limit": SYNC_SECONDS,
            "finish_limit": SYNC_SECONDS - 60,
        }
        tracker = _Tracker(spec, lines.append)
        tracker.start()
        tracker.send({"config": record})
        tracker.send({"close": "finished" if (run_dir / "result.json").exists() else "failed"})
        try:
            tracker.wait(time.monotonic() + SYNC_SECONDS)
        except BaseException:  # Ctrl-C
            tracker.kill()
            raise
    return lines


class _Tracker:
    """The training side of one tracker process: orders go to its stdin, lines for the user come from its stdout."""

    def __init__(self, spec: Spec, say: Callable[[str], None]) -> None:
        self._spec, self._say = spec, say
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, str(PROGRAM), json.dumps(self._spec)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C stops training, which then says how the run ended
            )
        except OSError as error:
            self._say(f"warning: {TITLES[self._spec['tracker']]} could not be started: {error}")
            return
        self._relay = threading.Thread(target=self._pass_on, daemon=True)
        self._relay.start()

    def send(self, order: dict[str, Any]) -> None:
        if not self._process:
            return
        with contextlib.suppress(OSError):  # raised where the process is gone; `wait` will say so
            self._process.stdin.write(json.dumps(order, default=str) + "\n")  # a thread over there only reads this,
            self._process.stdin.flush()  # so it cannot block

    def wait(self, deadline: float) -> None:
        """Wait for the process until `deadline` (of time.monotonic), then kill it."""
        if not self._process:
            return
        try:
            code = self._process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = self.kill()
        self._relay.join(timeout=1.0)
        if code not in (0, 1):  # 1: it has said itself what was wrong
            title = TITLES[self._spec["tracker"]]
            self._say(f"warning: {title} did not finish and was given up. {rebuild_hint(self._spec)}")
        with contextlib.suppress(OSError):  # what was left to send
            self._process.stdin.close()

    def kill(self) -> int:
        """End the process, whatever it is doing. Returns its exit code."""
        self._process.kill()
        code = self._process.wait()
        shutil.rmtree(Path(self._spec["run_dir"], "comet", "tmp"), ignore_errors=True)
        return code

    def _pass_on(self) -> None:
        for line in self._process.stdout:
            self._say(line.rstrip("\n"))


def _installed(on: Mapping[str, bool], say: Callable[[str], None]) -> list[str]:
    """The trackers in `on` whose package is there; says so of one whose package is not."""
    wanted = [name for name, is_on in on.items() if is_on]
    missing = [name for name in wanted if not importlib.util.find_spec(PACKAGES[name])]
    for name in missing:
        say(f"warning: {TITLES[name]} is off: the package {PACKAGES[name]} is not installed")
    return [name for name in wanted if name not in missing]


def _comet_may_be_configured() -> bool:
    """Whether any place exists that Comet reads an API key from; the tracker process then asks Comet itself."""
    files = ("./.env", "./.comet.config", "/content/drive/MyDrive/.comet.config", "~/.comet.config")
    return any(os.environ.get(name) for name in ("COMET_API_KEY", "COMET_CONFIG", "COMET_INI")) or any(
        Path(file).expanduser().is_file() for file in files
    )


def _number(key: str, value: Any) -> float:
    """A plain int or float from one of Python, NumPy or PyTorch."""
    with contextlib.suppress(RuntimeError, ValueError):  # more than one element
        value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be one number, not {value!r}")
    return value


def _json_number(value: float) -> float | str:
    """`value` itself, or the string "NaN", "Infinity" or "-Infinity"."""
    return value if math.isfinite(value) else json.dumps(value)


def _readable(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:z.4g}"  # no negative zero


def _say(text: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    if "tqdm" in sys.modules and sys.stderr.isatty():
        with contextlib.suppress(OSError):  # a terminal that was closed
            sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
            return
    say(text)


def _drop_torn_line(path: Path) -> None:
    """Cut off what a killed run left half written."""
    data = path.read_bytes() if path.exists() else b"\n"
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


# What tracker_process.py needs as well.


def rebuild_hint(spec: Spec) -> str:
    command = f"python main.py --sync {shlex.quote(spec['run_dir'])} --{spec['tracker']}"
    return f"metrics.jsonl has everything; to rebuild the copy: {command}"


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
