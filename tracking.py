"""The shared logger: metrics.jsonl, the console, Weights & Biases and Comet behind `log`, `log_config`, `close`.

`metrics.jsonl` is the truth. A tracker is a copy of it, made by a process of its own that runs this very file and
reads metrics.jsonl as it grows. So a tracker that refuses, fails or hangs cannot slow or break the run: at the end it
is killed, and `sync` rebuilds its copy from the same file with the same code. It also keeps the trackers' import
hooks, signal and exit handlers out of training, and finishes the copy in order even if training is killed.
Nothing but the standard library is imported here; wandb and comet_ml only in those processes.
"""
from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

PROBE_SECONDS = 3.0  # to learn whether a tracker's server answers
START_SECONDS = 10.0  # for W&B to open a run on a server that answered
FINISH_SECONDS = 15.0  # for W&B's last uploads, within CLOSE_SECONDS
CLOSE_SECONDS = 28.0  # that `close` waits, for all trackers together, before it kills them
SYNC_SECONDS = 600.0  # that `sync` waits for one tracker
POLL_SECONDS = 0.5  # between two looks at metrics.jsonl
TITLES = {"wandb": "W&B", "comet": "Comet"}
PACKAGES = {"wandb": "wandb", "comet": "comet_ml"}
EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}
# Comet's own patience (up to an hour) is cut to fit CLOSE_SECONDS; what the user has set stays.
COMET_DEFAULTS = {
    "ERROR_TRACKING_ENABLE": 0, "DISABLE_ANNOUNCEMENT": 1, "HTTP_SESSION_RETRY_TOTAL": 1,
    "TIMEOUT_HTTP": 3, "TIMEOUT_API": 3, "TIMEOUT_CLEANING": 10,  # seconds
    **{f"GET_OR_ADD_EXPERIMENT_RETRY_{kind}": 1 for kind in ("TOTAL", "CONNECT", "READ", "STATUS")},
}


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

    def __init__(self, path: Path, trackers: list[_Tracker]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._file = open(path, "a", encoding="utf-8")
        self._trackers = trackers
        for tracker in trackers:
            tracker.start()

    def log(self, values: Mapping[str, float], *, step: int, epoch: float) -> None:
        """See Logger. Not-a-number and infinity are written as the strings "NaN", "Infinity" and "-Infinity", which
        keeps the line valid JSON and which `float` reads back. Raises ValueError for what is not one number."""
        numbers = {key: _number(key, value) for key, value in values.items()}
        row = {"step": int(step), "epoch": _number("epoch", epoch), "time": time.time(), **numbers}
        self._file.write(json.dumps({key: _json_number(value) for key, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()
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
    the trackers hold online; an offline copy is always a new and whole one. Raises ValueError if metrics.jsonl is
    there and `resume` is not set.
    """
    path = Path(run_dir).resolve() / "metrics.jsonl"
    if path.exists() and not resume:
        raise ValueError(f"{path} exists already: resume that run or choose another folder")
    trackers = []
    for name, on in {"wandb": wandb, "comet": _comet_may_be_configured() if comet is None else comet}.items():
        if on and importlib.util.find_spec(PACKAGES[name]):
            trackers.append(_Tracker({
                "tracker": name, "run_dir": str(path.parent), "project": project, "run_name": run_name,
                "resume": resume, "sync": False, "needs_key": comet is None, "limit": CLOSE_SECONDS,
                "finish_limit": FINISH_SECONDS}, _say))
        elif on:
            _say(f"warning: {TITLES[name]} is off: the package {PACKAGES[name]} is not installed")
    return RunLogger(path, trackers)


def sync(run_dir: Path, *, wandb: bool, comet: bool) -> list[str]:
    """Rebuild a run's online copies from metrics.jsonl and config.json, with the original steps and times.

    A copy known to hold everything is left alone; one known to hold the beginning is completed; else a new run is
    made. Waits up to `SYNC_SECONDS` for each. Returns lines to print. Raises ValueError if `run_dir` is not a run.
    """
    run_dir = Path(run_dir).resolve()
    if not (run_dir / "metrics.jsonl").is_file():
        raise ValueError(f"{run_dir} has no metrics.jsonl, so there is nothing to sync")
    config = _read_json(run_dir / "config.json")
    project = config.get("config", {}).get("project", "distilbert-sentiment")
    status = "finished" if (run_dir / "result.json").exists() else "failed"
    lines: list[str] = []
    for name in (name for name, on in {"wandb": wandb, "comet": comet}.items() if on):
        if not importlib.util.find_spec(PACKAGES[name]):
            lines.append(f"warning: {TITLES[name]}: the package {PACKAGES[name]} is not installed")
            continue
        state = _read_json(run_dir / name / "state.json")
        tracker = _Tracker({
            "tracker": name, "run_dir": str(run_dir), "project": state.get("project", project),
            "run_name": state.get("run_name", run_dir.name), "resume": True, "sync": True, "needs_key": False,
            "limit": SYNC_SECONDS, "finish_limit": SYNC_SECONDS - 60}, lines.append)
        tracker.start()
        tracker.send({"config": config})
        tracker.send({"close": status})
        tracker.wait(time.monotonic() + SYNC_SECONDS)
    return lines


class _Tracker:
    """The training side of one tracker process: orders go to its stdin, lines for the user come from its stdout."""

    def __init__(self, spec: dict[str, Any], say: Callable[[str], None]) -> None:
        self._spec, self._say = spec, say
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), json.dumps(self._spec)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                encoding="utf-8", start_new_session=True,  # Ctrl-C stops training, which then says how the run ended
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
            self._process.kill()
            code = self._process.wait()
            shutil.rmtree(Path(self._spec["run_dir"], "comet", "tmp"), ignore_errors=True)
        self._relay.join(timeout=1.0)
        if code not in (0, 1):  # 1: it has said itself what was wrong
            title = TITLES[self._spec["tracker"]]
            self._say(f"warning: {title} did not finish and was given up. {_rebuild_hint(self._spec)}")
        with contextlib.suppress(OSError):  # what was left to send
            self._process.stdin.close()

    def _pass_on(self) -> None:
        for line in self._process.stdout:
            self._say(line.rstrip("\n"))


# What follows, up to the helpers, runs inside a tracker process.


class _Off(Exception):
    """The user's settings turn this tracker off; not an error."""


class _Wandb:
    """One W&B run, online if it can be, else in run_dir/wandb."""

    def __init__(self, spec: dict[str, Any], run_id: str | None) -> None:
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(name, spec["run_dir"])
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "disabled":
            raise _Off
        options = {
            "project": os.environ.get("WANDB_PROJECT") or spec["project"],
            "name": os.environ.get("WANDB_NAME") or spec["run_name"],
            "dir": spec["run_dir"],
            "settings": wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, save_code=False,
                x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
                init_timeout=START_SECONDS, finish_timeout=spec["finish_limit"], finish_timeout_raises=True),
        }
        why = f"WANDB_MODE={mode}" if mode in ("offline", "dryrun") else _unreachable(wandb.setup().settings.base_url)
        if not why:
            try:
                self._run = wandb.init(mode="online", id=run_id, resume="allow", **options)
            except Exception as error:
                why = _first_line(error)
        if why and spec["sync"]:
            raise RuntimeError(why)
        if why:
            self._run = wandb.init(mode="offline", **options)
        self.online, self.id, self.url = not why, self._run.id, self._run.url
        self.news = f"recording to {self.url}" if self.online else (
            f"recording offline ({why}). {_upload_hint(spec, f'wandb sync {Path(self._run.dir).parent}')}")

    def config(self, config: dict[str, Any]) -> None:
        self._run.config.update(config, allow_val_change=True)

    def log(self, row: dict[str, float]) -> None:
        values = {key: value for key, value in row.items() if key not in ("step", "time")}
        self._run.log({**values, "_timestamp": row["time"]}, step=row["step"])

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=EXIT_CODES[status])  # raises if finish_limit is over


class _Comet:
    """One Comet experiment, online if it can be, else in a zip in run_dir/comet that is written when it ends."""

    def __init__(self, spec: dict[str, Any], key: str | None) -> None:
        for name, value in COMET_DEFAULTS.items():
            os.environ.setdefault(f"COMET_{name}", str(value))
        self._folder = Path(spec["run_dir"], "comet")
        self._scratch = self._folder / "tmp"  # comet keeps an experiment in a temporary folder until it ends
        self._scratch.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = str(self._scratch)
        import comet_ml

        settings = comet_ml.get_config()
        api_key = comet_ml.config.get_api_key(None, settings)
        if settings.get_bool(None, "comet.auto_log.disable", default=False) or not (api_key or not spec["needs_key"]):
            shutil.rmtree(self._scratch)
            raise _Off
        self._errors = _Errors()
        logging.getLogger("comet_ml").addHandler(self._errors)
        why = None if api_key else "no API key"
        if settings.get_bool(None, "comet.start.online", default=True) is False:
            why = "COMET_START_ONLINE is off"
        # the very address that Comet asks first, because it waits 20 seconds for it
        why = why or _unreachable(comet_ml.config.get_backend_address(settings) + "isAlive/ver")
        if not why:
            why = self._start(comet_ml, spec, online=True, key=key)
        if why and spec["sync"]:
            raise RuntimeError(why)
        if why:
            self._start(comet_ml, spec, online=False, key=None)
        self.online, self.id = not why, self._experiment.get_key()
        self.url = self._experiment.url if self.online else None
        self.news = f"recording to {self.url}" if self.online else (
            f"recording offline ({why}). {_upload_hint(spec, f'comet upload {self._folder / self.id}.zip')}")
        self._zips, self._errors.lines = set(self._folder.glob("*.zip")), []

    def _start(self, comet_ml: Any, spec: dict[str, Any], *, online: bool, key: str | None) -> str | None:
        """Start an experiment, or continue experiment `key`. Returns why there is none, or None."""
        options = comet_ml.ExperimentConfig(
            name=spec["run_name"], offline_directory=str(self._folder), log_code=False, log_graph=False,
            parse_args=False, log_git_metadata=False, log_git_patch=False, log_env_details=False, auto_log_co2=False,
            auto_output_logging=False, auto_param_logging=False, auto_metric_logging=False, display_summary_level=0)
        project = comet_ml.get_config()["comet.project_name"] or spec["project"]
        try:
            self._experiment = comet_ml.start(
                project_name=project, online=online, experiment_key=key, mode="get" if key else "create",
                experiment_config=options)
        except Exception as error:
            return _first_line(error)
        # one that is not alive looks as if it worked, and swallows everything
        return None if self._experiment.alive else "; ".join(self._errors.lines) or "the server did not accept the run"

    def config(self, config: dict[str, Any]) -> None:
        self._experiment.log_parameters(config)

    def log(self, row: dict[str, float]) -> None:
        values = {key: value for key, value in row.items() if key not in ("step", "epoch", "time")}
        # Comet's API takes no time for a value: its messages ask this function of theirs, in milliseconds.
        sys.modules["comet_ml.messages"].local_timestamp = lambda: int(row["time"] * 1000)
        self._experiment.log_metrics(values, step=row["step"], epoch=row["epoch"])

    def finish(self, status: str) -> None:
        self._experiment.log_other("status", status)
        self._experiment.end()
        shutil.rmtree(self._scratch, ignore_errors=True)
        if not self.online:
            return
        if left := set(self._folder.glob("*.zip")) - self._zips:  # Comet's own answer to a lost connection
            raise RuntimeError(f"its server was lost on the way; what it had not taken is in {left.pop()}")
        if failed := [line for line in self._errors.lines if line.startswith("Failed to send")]:
            raise RuntimeError(failed[0])


class _Errors(logging.Handler):
    """Keeps the first line of every error that a library logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().strip().split("\n")[0].strip())


def _run_tracker(spec: dict[str, Any]) -> int:
    """A tracker process from start to end. Returns its exit code, 1 after it has said what went wrong."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the end of the run is told on stdin, however it comes
        signal.signal(number, signal.SIG_IGN)
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # drops what the libraries print

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody is left to read it
            print(text, file=lines, flush=True)

    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read_orders, args=(orders, spec["limit"]), daemon=True).start()
    title = TITLES[spec["tracker"]]
    try:
        _copy(spec, orders, lambda news: say(f"{title}: {news}"))
    except _Off:
        pass
    except Exception as error:
        say(f"warning: {title}: {_first_line(error)}. {_rebuild_hint(spec)}")
        return 1
    return 0


def _copy(spec: dict[str, Any], orders: queue.Queue[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Open the tracker, copy metrics.jsonl to it until the order to close has come, and finish it.

    run_dir/TRACKER/state.json has the id and url of the online copy and, only once that was finished in order, how
    many bytes of metrics.jsonl it holds. An offline copy leaves the state of an online one alone.
    """
    metrics = Path(spec["run_dir"], "metrics.jsonl")
    state_path = Path(spec["run_dir"], spec["tracker"], "state.json")
    state_path.parent.mkdir(parents=True, exist_ok=True)
    state = _read_json(state_path) if spec["resume"] else {}
    if spec["sync"] and state.get("bytes") == metrics.stat().st_size:
        say(f"nothing to do, {state['url']} is complete")
        return
    if not state.get("online") or (spec["sync"] and "bytes" not in state):
        state = {}  # offline, or nobody knows what it holds: make a new one
    tracker = {"wandb": _Wandb, "comet": _Comet}[spec["tracker"]](spec, state.get("id"))
    say(tracker.news)
    offset = state.get("bytes", 0) if tracker.online else 0
    now = {"id": tracker.id, "url": tracker.url, "online": tracker.online,
           "project": spec["project"], "run_name": spec["run_name"]}
    if tracker.online or not state:
        _write_json(state_path, now)
    status = None
    while status is None:
        try:
            order = orders.get(timeout=POLL_SECONDS)
        except queue.Empty:
            order = {}
        if "config" in order:
            tracker.config(order["config"])
        status = order.get("close")
        rows, offset = _read_rows(metrics, offset)  # after the order, so nothing logged before `close` is missed
        # A resumed run can have steps twice, and W&B takes rising steps only.
        for row in sorted(rows, key=lambda row: row["step"]):
            tracker.log(row)
    tracker.finish(status)
    if tracker.online:
        _write_json(state_path, {**now, "bytes": offset})
        say(f"complete at {tracker.url}" if spec["sync"] else f"finished {tracker.url}")


def _read_orders(orders: queue.Queue[dict[str, Any]], limit: float) -> None:
    """Queue the orders of the training side; its death without a word is an order to close. From then on the
    process has `limit` seconds, whatever the library is doing."""
    order: dict[str, Any] = {}
    for line in sys.stdin:
        order = json.loads(line)
        orders.put(order)
        if "close" in order:
            break
    else:
        orders.put({"close": "failed"})
    time.sleep(limit)
    os._exit(3)


def _read_rows(path: Path, offset: int) -> tuple[list[dict[str, float]], int]:
    """The whole lines of `path` from byte `offset` on, as numbers, and the byte after them."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    rows = [json.loads(line) for line in data.splitlines()]
    return [{key: float(v) if isinstance(v, str) else v for key, v in row.items()} for row in rows], offset + len(data)


def _unreachable(url: str) -> str | None:
    """Why the server at `url` cannot be used, or None. A refusal of this bare request is an answer too."""
    try:
        urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"{url} answered {error.code}" if error.code >= 500 else None
    except (OSError, ValueError) as error:
        return f"{url} cannot be reached: {getattr(error, 'reason', error)}"
    return None


# Helpers of both sides.


def _comet_may_be_configured() -> bool:
    """Whether any place exists that Comet reads an API key from; the tracker process then asks Comet itself."""
    files = ("./.env", "./.comet.config", "/content/drive/MyDrive/.comet.config", "~/.comet.config")
    return any(os.environ.get(name) for name in ("COMET_API_KEY", "COMET_CONFIG", "COMET_INI")) or any(
        Path(file).expanduser().is_file() for file in files)


def _upload_hint(spec: dict[str, Any], command: str) -> str:
    return f"To upload later: {command}, or python main.py --sync {spec['run_dir']}"


def _rebuild_hint(spec: dict[str, Any]) -> str:
    return f"metrics.jsonl has everything; to rebuild the copy: python main.py --sync {spec['run_dir']}"


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].rstrip(".")
    return text if " " in text else f"{type(error).__name__} {text}".strip()


def _number(key: str, value: Any) -> float:
    """A plain int or float from one of Python, NumPy or PyTorch."""
    with contextlib.suppress(RuntimeError, ValueError):  # more than one element
        value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key} must be one number, not {value!r}")
    return value


def _json_number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _readable(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.4g}"


def _say(text: str) -> None:
    """One line on stderr, above a progress bar if there is one."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


def _drop_torn_line(path: Path) -> None:
    """Cut off what a killed run left half written."""
    data = path.read_bytes() if path.exists() else b"\n"
    if not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value), encoding="utf-8")
    scratch.replace(path)


if __name__ == "__main__":
    sys.exit(_run_tracker(json.loads(sys.argv[1])))
