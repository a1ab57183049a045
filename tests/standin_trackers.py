"""W&B and Comet as far as recording a run needs them, readers of both offline copies, and rows to log."""

import gzip
import json
import math
import struct
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tracking

WANDB_KEY, COMET_KEY, HF_TOKEN = "wandbsecret" * 4, "cometsecret" * 3, "hf_" + "hubsecret" * 4
# By step: train and validation in separate calls at one step, the last step among them.
ROWS = [
    ({"train/loss": 0.7, "train/lr": 1e-5, "train/samples_per_second": 1234.5}, 1, 0.25),
    ({"train/loss": 1 / 3, "train/lr": 2e-5, "train/samples_per_second": 1e-320}, 2, 0.5),
    ({"train/loss": math.inf, "train/lr": 0.0}, 3, 0.75),
    ({"train/loss": 0.1, "train/lr": 1e-300}, 4, 1.0),
    ({"val/accuracy": 0.875, "val/loss": math.nan}, 4, 1.0),
]
# Nothing of the machine, of git or of the command line: those would be "environment" and "files".
WANDB_KINDS = ("header", "run", "config", "history", "summary", "telemetry", "exit")
Copy = dict[int, dict[str, Any]]  # step -> key -> value


class Server(ThreadingHTTPServer):
    """Enough of W&B and Comet to record a run. `mode`: ok, hang, 500; late-hang and late-500 answer probes only."""

    daemon_threads = True

    def __init__(self, mode: str = "ok") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mode, self.requests = mode, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that were killed

    def wandb_rows(self) -> Copy:
        copy: Copy = defaultdict(dict)
        for path, body in list(self.requests):
            if path.endswith("/file_stream"):
                for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                    row = json.loads(line)
                    copy[row["_step"]].update(row)
        return copy

    def comet_rows(self) -> Copy:
        copy: Copy = defaultdict(dict)
        for path, body in list(self.requests):
            if path.endswith("/experiment/metric"):
                for value in json.loads(body)["values"]:
                    add_comet(copy, value, value["timestamp"])
        return copy

    def runs(self) -> set[str]:
        """The ids of all runs that metrics came for."""
        streams = {path.split("/")[-2] for path, _ in self.requests if path.endswith("/file_stream")}
        return streams | {
            json.loads(body)["experimentKey"] for path, body in self.requests if path.endswith("/experiment/metric")
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        mode = self.server.mode
        if mode.startswith("late-"):
            mode = "ok" if self.path in ("/", "/clientlib/isAlive/ver") else mode[5:]
        if mode == "hang":
            time.sleep(60)
            return
        if mode == "ok":
            self.server.requests.append((self.path, body))
        reply = json.dumps(self.content(body) if mode == "ok" else {}).encode()
        self.send_response(200 if mode == "ok" else 500)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_PUT = answer

    def content(self, body: bytes) -> dict[str, Any]:  # noqa: PLR0911, one reply for each kind of request
        if self.path == "/graphql":
            request = json.loads(body)
            query, given = request["query"], request["variables"]
            if "upsertBucket" in query:
                project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "e"}}
                bucket = {"id": "x", "name": given["name"], "displayName": "r", "sweepName": None, "project": project}
                return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
            if "createRunFiles" in query:
                files = [{"name": name, "uploadUrl": None} for name in given["files"]]
                return {"data": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": files}}}
            return {"data": {"model": None, "serverInfo": {"features": []}, "viewer": None}}
        if self.path.endswith(("/add/run", "/get/run", "/old/run")):
            return {"runId": "r", "project_id": "p", "focusUrl": f"{self.server.url}/w/p/"}
        if self.path.endswith("/isAlive/ver"):
            return {"version": "4.0.0"}
        if "experiment/metadata" in self.path:
            return {"experimentKey": "k", "experimentName": "r", "workspaceName": "w", "projectName": "p"}
        return {"is_alive_beat_duration_millis": 1000, "gpu_monitor_interval_millis": 10000}


def add_comet(copy: Copy, value: dict[str, Any], milliseconds: int) -> None:
    if value["metricName"] != "process duration":  # Comet's own
        copy[value["step"]] |= {value["metricName"]: value["metricValue"], "epoch": value["epoch"]}
        copy[value["step"]].setdefault("times", set()).add(milliseconds)


def wandb_offline(run_dir: Path) -> tuple[Copy, dict[str, Any], int | None]:
    """History, config and exit code in the newest .wandb file: a LevelDB log of protobuf records. A block of 32 KiB
    holds chunks of 7 bytes (CRC, length, kind) and data; kinds 1 and 4 end a record; a 7-byte file header counts."""
    from wandb.proto import wandb_internal_pb2

    data = max(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns).read_bytes()
    assert data[:4] == b":W&B"
    copy, config, code, record, place = defaultdict(dict), {}, None, b"", 7
    while place < len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            message = wandb_internal_pb2.Record.FromString(record)
            record = b""
            what = message.WhichOneof("record_type")
            assert what in WANDB_KINDS and not message.run.HasField("git"), message
            for item in message.history.item:
                copy[message.history.step.num][item.nested_key[0]] = json.loads(item.value_json)
            config |= {item.key: json.loads(item.value_json) for item in message.config.update}
            code = message.exit.exit_code if what == "exit" else code
    return copy, config, code


def comet_offline(run_dir: Path) -> tuple[Copy, dict[str, Any], str | None]:
    """Metrics, parameters and status in the newest zip."""
    path = max((run_dir / "comet").glob("*.zip"), key=lambda p: p.stat().st_mtime_ns)
    copy, parameters, status = defaultdict(dict), {}, None
    for line in zipfile.ZipFile(path).read("messages.json").splitlines():
        message = json.loads(line)
        payload = message["payload"]
        if message["type"] == "metric_msg":
            add_comet(copy, payload["metric"], payload["local_timestamp"])
        else:
            assert message["type"] in ("parameter_msg", "log_other"), message  # no code, no git, no system details
        if message["type"] == "parameter_msg":
            parameter = payload.get("param") or payload["params"]  # the second where the value is a list
            parameters[parameter["paramName"]] = parameter["paramValue"]
        elif payload.get("key") == "status":
            status = payload["value"]
    return copy, parameters, status


def truth(run_dir: Path) -> tuple[Copy, Copy]:
    """metrics.jsonl as W&B should have it (a step's time is its last) and as Comet should (all its times)."""
    wandb, comet = defaultdict(dict), defaultdict(dict)
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        step, seconds = row.pop("step"), row.pop("time")
        wandb[step] |= {**row, "_step": step, "_timestamp": seconds}
        comet[step] |= row
        comet[step].setdefault("times", set()).add(int(seconds * 1000))
    return wandb, comet


def text(value: Any) -> Any:
    """W&B writes the bare words NaN and Infinity: name them as metrics.jsonl does."""
    return tracking._json_number(value) if isinstance(value, float) else value


def assert_wandb(copy: Copy, run_dir: Path) -> None:
    got = {step: {key: text(value) for key, value in row.items() if key != "_runtime"} for step, row in copy.items()}
    assert got == truth(run_dir)[0]


def assert_comet(copy: Copy, run_dir: Path) -> None:
    assert copy == truth(run_dir)[1]


def assert_no_secret(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        parts = [path.read_bytes()]
        if path.suffix == ".zip":
            archive = zipfile.ZipFile(path)
            parts = [archive.read(name) for name in archive.namelist()]
        for data in parts:
            assert not [secret for secret in (b"wandbsecret", b"cometsecret", b"hubsecret") if secret in data], path


def open_run(run_dir: Path, **options: Any) -> tracking.Logger:
    return tracking.open_logger(run_dir, project="p", run_name="r", **options)


def log_rows(logger: tracking.Logger, rows: list[Any] = ROWS) -> float:
    """Log `rows`; returns the seconds of the slowest call."""
    slowest = 0.0
    for values, step, epoch in rows:
        start = time.perf_counter()
        logger.log(values, step=step, epoch=epoch)
        slowest = max(slowest, time.perf_counter() - start)
    return slowest


def heard(env: Any) -> list[str]:
    """What is said to the user, a list that grows."""
    lines: list[str] = []
    env.setattr(tracking, "_say", lines.append)
    return lines


def point_at(env: Any, server: Server | None) -> None:
    """Both trackers at one server with dummy keys; None is a port that refuses."""
    url = server.url if server else "http://127.0.0.1:9"
    for name, value in {
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": WANDB_KEY,
        "COMET_URL_OVERRIDE": f"{url}/clientlib/",
        "COMET_API_KEY": COMET_KEY,
    }.items():
        env.setenv(name, value)


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.05)
