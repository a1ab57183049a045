"""One tracker process: copies a run's metrics.jsonl to Weights & Biases or Comet as it grows.

tracking.py starts `python tracker_process.py SPEC`, SPEC being its `Spec` as JSON. Orders come as JSON lines on stdin:
{"config": ...}, and {"close": STATUS} to end; the end of stdin is an order to close, because then training has died.
Lines for the user go to stdout. Exit code 0, or 1 after it has said what went wrong; any other: it did not finish.
"""

import contextlib
import json
import logging
import os
import queue
import shlex
import shutil
import signal
import ssl
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from tracking import EXIT_CODES, TITLES, Spec, read_json, rebuild_hint

PROBE_SECONDS = 3.0  # to learn whether a tracker's server answers
START_SECONDS = 10.0  # for W&B to open a run on a server that answered
POLL_SECONDS = 0.5  # between two looks at metrics.jsonl
# Comet's own patience (up to an hour) is cut to fit CLOSE_SECONDS; what the user has set stays.
COMET_DEFAULTS = {
    "ERROR_TRACKING_ENABLE": 0,
    "DISABLE_ANNOUNCEMENT": 1,
    "HTTP_SESSION_RETRY_TOTAL": 1,
    "TIMEOUT_HTTP": 3,
    "TIMEOUT_API": 3,
    "TIMEOUT_CLEANING": 10,  # seconds
    **{f"GET_OR_ADD_EXPERIMENT_RETRY_{kind}": 1 for kind in ("TOTAL", "CONNECT", "READ", "STATUS")},
}
# What Comet would collect beside our values.
COMET_EXTRAS = [
    *("log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch", "log_env_details"),
    *("auto_log_co2", "auto_output_logging", "auto_param_logging", "auto_metric_logging"),
]


class _Off(Exception):
    """The user's settings turn this tracker off; not an error."""


class _Wandb:
    """One W&B run, online if it can be, else in run_dir/wandb."""

    def __init__(self, spec: Spec, state: dict[str, Any]) -> None:
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ.setdefault(name, spec["run_dir"])
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "disabled":
            raise _Off
        options = {
            "project": (state.get("entity") and state["project"]) or os.environ.get("WANDB_PROJECT") or spec["project"],
            "entity": state.get("entity"),  # None: as the user's settings say
            "name": os.environ.get("WANDB_NAME") or spec["run_name"],
            "dir": spec["run_dir"],
            "settings": wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                init_timeout=START_SECONDS,
                finish_timeout=spec["finish_limit"],
                finish_timeout_raises=True,
            ),
        }
        why = f"WANDB_MODE={mode}" if mode in ("offline", "dryrun") else _unreachable(wandb.setup().settings.base_url)
        if not why:
            try:
                self._run = wandb.init(mode="online", id=state.get("id"), resume="allow", **options)
            except Exception as error:
                why = _first_line(error)
        if why and spec["sync"]:
            raise RuntimeError(why)
        if why:
            self._run = wandb.init(mode="offline", **options)
        self.online, self.id, self.url = not why, self._run.id, self._run.url
        self.place = {"project": self._run.project, "entity": self._run.entity}
        self._first_step = self._run.starting_step
        self.news = _news(spec, self.url, why, f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}")

    def config(self, config: dict[str, Any]) -> None:
        self._run.config.update(config, allow_val_change=True)

    def log(self, row: dict[str, float]) -> None:
        values = {key: value for key, value in row.items() if key not in ("step", "time")}
        if row["step"] < self._first_step - 1:
            return  # the run that goes on has it
        # Of the step that it had come to it may lack some lines, and would drop them: one step too late is better.
        self._run.log({**values, "_timestamp": row["time"]}, step=max(row["step"], self._first_step))

    def finish(self, status: str) -> None:
        self._run.finish(exit_code=EXIT_CODES[status])  # raises if finish_limit is over


class _Comet:
    """One Comet experiment, online if it can be, else in a zip in run_dir/comet that is written when it ends."""

    def __init__(self, spec: Spec, state: dict[str, Any]) -> None:
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
            why = self._start(comet_ml, spec, online=True, key=state.get("id"))
        if why and spec["sync"]:
            raise RuntimeError(why)
        if why:
            self._start(comet_ml, spec, online=False, key=None)
        self.online, self.id = not why, self._experiment.get_key()
        self.url = self._experiment.url if self.online else None
        self.place = {"project": spec["project"]}
        self.news = _news(spec, self.url, why, f"comet upload {shlex.quote(f'{self._folder / self.id}.zip')}")
        self._zips, self._errors.lines = set(self._folder.glob("*.zip")), []

    def _start(self, comet_ml: Any, spec: Spec, *, online: bool, key: str | None) -> str | None:
        """Start an experiment, or continue experiment `key`. Returns why there is none, or None."""
        options = comet_ml.ExperimentConfig(
            name=spec["run_name"],
            offline_directory=str(self._folder),
            **dict.fromkeys(COMET_EXTRAS, False),
            display_summary_level=0,
        )
        project = comet_ml.get_config()["comet.project_name"] or spec["project"]
        try:
            self._experiment = comet_ml.start(
                project_name=project,
                online=online,
                experiment_key=key,
                mode="get" if key else "create",
                experiment_config=options,
            )
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


def _run_tracker(spec: Spec) -> int:
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
        if spec["sync"]:
            say(f"warning: {title} is off: its own settings disable it")
    except Exception as error:
        say(f"warning: {title}: {_first_line(error)}. {rebuild_hint(spec)}")
        return 1
    return 0


def _copy(spec: Spec, orders: queue.Queue[dict[str, Any]], say: Callable[[str], None]) -> None:
    """Open the tracker, copy metrics.jsonl to it until the order to close has come, and finish it.

    run_dir/TRACKER/state.json has the id and url of the online copy and, only once that was finished in order, how
    many lines of metrics.jsonl it holds. An offline copy leaves the state of an online one alone. A resumed run cuts
    lines and writes them again, the same but for their times: what the copy holds of them is not sent twice.
    A process of the same run that is still uploading, as after a kill, is waited for.
    """
    metrics = Path(spec["run_dir"], "metrics.jsonl")
    state_path = Path(spec["run_dir"], spec["tracker"], "state.json")
    state_path.parent.mkdir(parents=True, exist_ok=True)
    alone = FileLock(state_path.with_name(".lock"))
    alone.acquire()
    state = read_json(state_path) if spec["resume"] else {}
    if spec["sync"] and state.get("lines", -1) >= len(_read_rows(metrics, 0)[0]):
        say(f"nothing to do, {state['url']} is complete; to upload it anew, delete {state_path}")
        return
    # Offline, or nobody knows what it holds: make a new one. (When training goes on, `_Wandb.log` drops what it has.)
    if not state.get("online") or ("lines" not in state and (spec["sync"] or spec["tracker"] == "comet")):
        state = {}
    tracker = {"wandb": _Wandb, "comet": _Comet}[spec["tracker"]](spec, state)
    say(tracker.news)
    now = {
        "id": tracker.id,
        "url": tracker.url,
        "online": tracker.online,
        **tracker.place,
        "run_name": spec["run_name"],
    }
    if tracker.online or not state:
        _write_json(state_path, now)
    status, held = _follow(metrics, state.get("lines", 0) if tracker.online else 0, orders, tracker)
    tracker.finish(status)
    if tracker.online:
        _write_json(state_path, {**now, "lines": held})
        say(f"complete at {tracker.url}" if spec["sync"] else f"finished {tracker.url}")


def _follow(metrics: Path, held: int, orders: queue.Queue[dict[str, Any]], tracker: _Wandb | _Comet) -> tuple[str, int]:
    """Copy `metrics` behind its first `held` lines until the order to close. Returns its status and the lines held."""
    offset = read = 0
    while True:
        try:
            order = orders.get(timeout=POLL_SECONDS)
        except queue.Empty:
            order = {}
        if "config" in order:
            tracker.config(order["config"])
        rows, offset = _read_rows(metrics, offset)  # after the order, so nothing logged before `close` is missed
        new = rows[max(0, held - read) :]
        read += len(rows)
        # W&B takes rising steps only.
        for row in sorted(new, key=lambda row: row["step"]):
            tracker.log(row)
        if "close" in order:
            return order["close"], max(held, read)


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
    with path.open("rb") as file:
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
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):  # the tracker's library trusts certificates of its own
            return None
        return f"{url} cannot be reached: {reason}"
    return None


def _news(spec: Spec, url: str | None, why: str | None, command: str) -> str:
    """Where the copy is made; offline, also `why`, and the `command` that uploads it."""
    if not why:
        return f"recording to {url}"
    again = f"python main.py --sync {shlex.quote(spec['run_dir'])}"
    return f"recording offline ({why}). To upload later: {command}, or {again}"


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].rstrip(".")
    return text if " " in text else f"{type(error).__name__} {text}".strip()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value), encoding="utf-8")
    scratch.replace(path)


if __name__ == "__main__":
    sys.exit(_run_tracker(json.loads(sys.argv[1])))
