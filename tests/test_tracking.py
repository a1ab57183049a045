"""tracking.py with the real wandb and comet_ml: offline, and against servers on this machine that misbehave."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
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
            for item in message.history.item:
                copy[message.history.step.num][item.nested_key[0]] = json.loads(item.value_json)
            config |= {item.key: json.loads(item.value_json) for item in message.config.update}
            code = message.exit.exit_code if message.WhichOneof("record_type") == "exit" else code
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
        elif message["type"] == "parameter_msg":
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


def log_rows(logger: tracking.Logger, rows: list[Any] = ROWS) -> float:
    """Log `rows`; returns the seconds of the slowest call."""
    slowest = 0.0
    for values, step, epoch in rows:
        start = time.perf_counter()
        logger.log(values, step=step, epoch=epoch)
        slowest = max(slowest, time.perf_counter() - start)
    return slowest


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


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.05)


@pytest.fixture(scope="module", autouse=True)
def clean_machine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """No settings of the user's, and an empty home, working and temporary folder, which must stay empty."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as env:
        for name in list(os.environ):
            if name.startswith(("WANDB_", "COMET_")) or name.lower().endswith("_proxy"):
                env.delenv(name)
        for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR"):
            env.setenv(name, str(home))
        env.chdir(home)
        yield
    # but for matplotlib's font cache and the port number of a wandb that was killed as it started
    left = [path for path in home.rglob("*") if path.is_file() and path.parent.name != "matplotlib"]
    assert [path for path in left if not path.name.startswith("port-")] == []


@dataclass
class Outcome:
    run_dir: Path
    lines: list[str]
    open_seconds: float
    slowest_log: float
    close_seconds: float


SCENARIOS = {
    "refuse": None,
    "hang": "hang",
    "500": "500",
    "late-hang": "late-hang",
    "late-500": "late-500",
    "mid-hang": "ok",
    "mid-500": "ok",
}


@pytest.fixture(scope="module")
def outcomes(clean_machine: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """One run of each scenario with both trackers, all at the same time, because most of it is waiting."""
    done: dict[str, Outcome] = {}
    threads = []
    for name, mode in SCENARIOS.items():
        with pytest.MonkeyPatch.context() as env:
            server = Server(mode) if mode else None
            point_at(env, server)
            if name.startswith("mid-"):  # shorter than the defaults (28 s in all), or this file takes a minute
                env.setattr(tracking, "FINISH_SECONDS", 5.0)
                env.setenv("COMET_TIMEOUT_API", "1")
                env.setenv("COMET_TIMEOUT_HTTP", "1")
            lines: list[str] = []
            env.setattr(tracking, "_say", lines.append)
            outcome = done[name] = Outcome(tmp_path_factory.mktemp(name), lines, 0.0, 0.0, 0.0)
            start = time.perf_counter()
            logger = tracking.open_logger(outcome.run_dir, wandb=True, project="p", run_name="r")
            outcome.open_seconds = time.perf_counter() - start
        threads.append(threading.Thread(target=finish_scenario, args=(name, outcome, logger, server)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return done


def finish_scenario(name: str, outcome: Outcome, logger: tracking.Logger, server: Server | None) -> None:
    logger.log_config({"lr": 2e-5, "nothing": None, "path": Path("x")})
    outcome.slowest_log = log_rows(logger, ROWS[:2])
    if name.startswith("mid-"):
        paths = ("/file_stream", "/experiment/metric")  # each has taken something
        wait_until(lambda: all(any(path.endswith(end) for path, _ in list(server.requests)) for end in paths))
        server.mode = name[4:]
    outcome.slowest_log = max(outcome.slowest_log, log_rows(logger, ROWS[2:]))
    start = time.perf_counter()
    logger.close()
    outcome.close_seconds = time.perf_counter() - start


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_server_costs_the_run_more_than_its_limits(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.open_seconds < 1.0
    assert outcome.slowest_log < 0.5
    assert outcome.close_seconds < 30.0
    assert len((outcome.run_dir / "metrics.jsonl").read_text().splitlines()) == len(ROWS)
    assert_no_secret(outcome.run_dir)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if not name.startswith("mid-")])
def test_offline_copies_are_exact(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    wandb_copy, wandb_config, exit_code = wandb_offline(outcome.run_dir)
    comet_copy, parameters, status = comet_offline(outcome.run_dir)
    assert_wandb(wandb_copy, outcome.run_dir)
    assert_comet(comet_copy, outcome.run_dir)
    assert math.isnan(wandb_copy[4]["val/loss"]) and wandb_copy[3]["train/loss"] == math.inf
    assert comet_copy[4]["val/loss"] == "NaN" and comet_copy[3]["train/loss"] == "Infinity"
    for config in (wandb_config, parameters):
        assert config["lr"] == 2e-5 and config["path"] == "x"
    assert (exit_code, status) == (0, "finished")
    folder = next(outcome.run_dir.glob("wandb/offline-run-*"))
    archive = next(outcome.run_dir.glob("comet/*.zip"))
    assert zipfile.ZipFile(archive).namelist() == ["experiment.json", "messages.json"]  # no code, no packages
    notes = "\n".join(outcome.lines)
    assert f"wandb sync {folder}, or python main.py --sync {outcome.run_dir}" in notes
    assert f"comet upload {archive}, or python main.py --sync {outcome.run_dir}" in notes
    assert "warning" not in notes


@pytest.mark.parametrize("name", ["mid-hang", "mid-500"])
def test_a_server_lost_on_the_way_is_one_warning_each(outcomes: dict[str, Outcome], name: str) -> None:
    warnings = [line for line in outcomes[name].lines if line.startswith("warning: ")]
    assert sorted(line.split(":")[1] for line in warnings) == [" Comet", " W&B"], warnings
    assert all("python main.py --sync" in line for line in warnings)
    for tracker in ("wandb", "comet"):  # not taken for whole
        assert "lines" not in json.loads((outcomes[name].run_dir / tracker / "state.json").read_text())


def test_a_tracker_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, Server("hang"))
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.5)
    lines: list[str] = []
    monkeypatch.setattr(tracking, "_say", lines.append)
    logger = tracking.open_logger(tmp_path, wandb=True, comet=True, project="p", run_name="r")
    start = time.perf_counter()
    logger.close("failed")
    assert time.perf_counter() - start < 3.0
    assert sum("did not finish and was given up" in line for line in lines) == 2
    assert all(tracker._process.poll() is not None for tracker in logger._trackers)


def test_a_tracker_that_dies_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    logger = tracking.open_logger(tmp_path, wandb=True, comet=False, project="p", run_name="r")
    logger._trackers[0]._process.kill()
    logger._trackers[0]._process.wait()
    logger.log_config({"lr": 2e-5})
    log_rows(logger, ROWS[:1])
    logger.close()
    del logger
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("step ")]
    assert len(lines) == 1 and lines[0].startswith("warning: W&B did not finish and was given up"), lines


def test_without_keys_both_record_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", Server().url)
    lines: list[str] = []
    monkeypatch.setattr(tracking, "_say", lines.append)
    logger = tracking.open_logger(tmp_path, wandb=True, comet=True, project="p", run_name="r")
    log_rows(logger)
    logger.close("interrupted")
    assert_wandb(wandb_offline(tmp_path)[0], tmp_path)
    assert_comet(comet_offline(tmp_path)[0], tmp_path)
    assert wandb_offline(tmp_path)[2] == 130 and comet_offline(tmp_path)[2] == "interrupted"
    notes = [line for line in lines if "offline" in line]
    assert len(notes) == 2 and all("API key" in line for line in notes), notes


def test_comet_is_on_where_a_key_is_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trackers(name: str, comet: bool | None) -> list[str]:
        logger = tracking.open_logger(tmp_path / name, comet=comet, project="p", run_name="r")
        logger.close()
        return [tracker._spec["tracker"] for tracker in logger._trackers]

    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.0)
    assert trackers("none", None) == []
    point_at(monkeypatch, None)
    assert trackers("off", False) == []
    assert trackers("on", None) == ["comet"]


def test_a_config_file_without_a_key_leaves_comet_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings").write_text("[comet]\nworkspace=w\n")
    monkeypatch.setenv("COMET_CONFIG", str(tmp_path / "settings"))
    lines: list[str] = []
    monkeypatch.setattr(tracking, "_say", lines.append)
    logger = tracking.open_logger(tmp_path / "run", project="p", run_name="r")
    logger.close()
    assert lines == [] and not list((tmp_path / "run").rglob("*.zip"))


def test_copies_are_finished_when_training_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, None)
    script = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; import pathlib, tracking, test_tracking as t\n"
        "logger = tracking.open_logger(pathlib.Path(sys.argv[1]), wandb=True, project='p', run_name='r')\n"
        "t.log_rows(logger); print('ready', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(ROOT), str(ROOT / "tests")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        run.stdout.readline()
        os.killpg(run.pid, signal.SIGKILL)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(ROWS)  # flushed as they came
    wait_until(lambda: not (tmp_path / "comet/tmp").exists() and list(tmp_path.glob("comet/*.zip")))
    wait_until(lambda: list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and wandb_offline(tmp_path)[2] == 1)
    assert_wandb(wandb_offline(tmp_path)[0], tmp_path)
    assert_comet(comet_offline(tmp_path)[0], tmp_path)


def test_resume_continues_the_online_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [Server(), Server()]
    for resume, (server, rows) in enumerate(zip(servers, (ROWS[:3], ROWS[3:]))):
        point_at(monkeypatch, server)
        logger = tracking.open_logger(tmp_path, wandb=True, project="p", run_name="r", resume=bool(resume))
        log_rows(logger, rows)
        logger.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "tra' * (1 - resume))  # as a killed run leaves it
    ids = {json.loads((tmp_path / name / "state.json").read_text())["id"] for name in ("wandb", "comet")}
    assert servers[0].runs() == servers[1].runs() == ids
    assert set(servers[1].wandb_rows()) == set(servers[1].comet_rows()) == {4}  # only what was new
    assert_wandb(servers[0].wandb_rows() | servers[1].wandb_rows(), tmp_path)
    assert_comet(servers[0].comet_rows() | servers[1].comet_rows(), tmp_path)
    assert_no_secret(tmp_path)


def test_sync_rebuilds_both_copies_once(
    outcomes: dict[str, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = outcomes["mid-500"].run_dir
    unsure = {json.loads((run_dir / name / "state.json").read_text())["id"] for name in ("wandb", "comet")}
    (run_dir / "config.json").write_text(json.dumps({"lr": 2e-5}))
    again = {"step": 2, "epoch": 0.5, "time": time.time(), "train/loss": 0.25}  # as a run resumed from step 1 leaves
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    point_at(monkeypatch, None)
    failed = tracking.sync(run_dir, wandb=True, comet=False)
    assert len(failed) == 1 and failed[0].startswith("warning: W&B: http://127.0.0.1:9 cannot be reached")
    server = Server()
    point_at(monkeypatch, server)
    lines = tracking.sync(run_dir, wandb=True, comet=True)
    assert sum("complete at" in line for line in lines) == 2, lines
    assert_wandb(server.wandb_rows(), run_dir)
    assert_comet(server.comet_rows(), run_dir)
    assert len(server.runs()) == 2 and not server.runs() & unsure
    assert any(b"2e-05" in body or b"0.00002" in body for path, body in server.requests if path == "/graphql")
    asked = len(server.requests)
    lines = tracking.sync(run_dir, wandb=True, comet=True)
    assert len(lines) == 2 and all("nothing to do" in line for line in lines), lines
    assert len(server.requests) == asked
    with pytest.raises(ValueError, match="nothing to sync"):
        tracking.sync(tmp_path, wandb=True, comet=True)


def test_sync_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(*words: str) -> tuple[int, list[str], str]:
        done = subprocess.run(
            [sys.executable, ROOT / "main.py", "--sync", *words], capture_output=True, text=True, check=False
        )
        lines = [line.split(", ")[0].split(" http")[0] for line in done.stdout.splitlines()]
        return done.returncode, lines, done.stderr

    run_dir, empty, server = tmp_path / "run", tmp_path / "empty", Server()
    empty.mkdir()
    logger = tracking.open_logger(run_dir, comet=False, project="p", run_name="r")
    log_rows(logger)
    logger.close()
    point_at(monkeypatch, server)
    (run_dir / "config.json").write_text(json.dumps({"config": {"wandb": False, "comet": None}}))
    for folder, why in ((empty, "no metrics.jsonl"), (tmp_path / "gone", "no metrics.jsonl"), (run_dir, "--wandb")):
        code, out, err = main(str(folder))
        assert (code, out) == (2, []) and err.count("\n") == 1, err
        assert err.startswith("error: ") and str(folder) in err and why in err
    (run_dir / "config.json").write_text(json.dumps({"config": {"wandb": True, "comet": None, "project": "mine"}}))
    point_at(monkeypatch, None)
    code, out, err = main(str(run_dir), "--comet")
    assert (code, out, err.count("\n")) == (2, [], 1) and err.startswith("error: W&B: ") and "; Comet: " in err
    point_at(monkeypatch, server)
    assert main(str(run_dir)) == (0, ["W&B: recording to", "W&B: complete at"], "")
    assert main(str(run_dir), "--comet") == (0, ["W&B: nothing to do", "Comet: recording to", "Comet: complete at"], "")
    assert_wandb(server.wandb_rows(), run_dir)
    assert_comet(server.comet_rows(), run_dir)
    assert any(b'"mine"' in body for path, body in server.requests if path == "/graphql")
    assert main(str(run_dir)) == (0, ["W&B: nothing to do", "Comet: nothing to do"], "")
    assert main(str(run_dir), "--no-comet") == (0, ["W&B: nothing to do"], "")
    assert_no_secret(run_dir)


def test_the_upload_commands_that_were_printed_work(
    outcomes: dict[str, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, server = outcomes["refuse"].run_dir, Server()
    point_at(monkeypatch, server)
    for name in ("TMPDIR", "XDG_CACHE_HOME"):  # these commands keep logs there
        monkeypatch.setenv(name, str(tmp_path))
    commands = [
        line.split("To upload later: ")[1].split(", or")[0].split()
        for line in outcomes["refuse"].lines
        if "To upload later: " in line
    ]
    scripts = Path(sys.executable).parent
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    uploads = [subprocess.Popen([str(scripts / name), *rest], **quiet) for name, *rest in commands]
    assert [upload.wait(timeout=40) for upload in uploads] == [0, 0]
    assert_wandb(server.wandb_rows(), run_dir)
    assert_comet(server.comet_rows(), run_dir)


@pytest.mark.parametrize("online", [True, False])
def test_no_secret_of_the_environment_reaches_a_file_or_the_screen(
    tiny_model: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: bool
) -> None:
    """A whole run of the command line with both trackers: its folder, the cache, and what it prints."""
    point_at(monkeypatch, Server() if online else None)
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)
    monkeypatch.setenv("DISTILBERT_SENTIMENT_CACHE", str(tmp_path / "cache"))
    where = ["--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes")]
    where += ["--output_dir", str(tmp_path / "runs"), "--epochs", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", "--finetune", "--wandb", *where], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "recording to" in done.stderr if online else done.stderr.count("recording offline") == 2
    assert len(list(tmp_path.rglob("wandb/*run-*"))) == len(list(tmp_path.rglob("comet/state.json"))) == 1
    assert_no_secret(tmp_path)
    said = done.stdout + done.stderr
    assert not [secret for secret in (WANDB_KEY, COMET_KEY, HF_TOKEN) if secret[3:] in said]


def test_a_resumed_run_sends_no_line_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of a killed run holds lines that the resumed one cuts and writes again; so does a copy with a part."""
    for number, (kept, rows) in enumerate(((0, ROWS[:4]), (2, ROWS[2:3]), (3, ROWS[3:]))):
        server = Server()
        point_at(monkeypatch, server)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:kept] if number else []
        (tmp_path / "metrics.jsonl").write_text("".join(lines)) if number else None  # cut back to the checkpoint
        logger = tracking.open_logger(tmp_path, wandb=True, project="p", run_name="r", resume=bool(number))
        log_rows(logger, rows)
        logger.close()
        state = json.loads((tmp_path / "comet" / "state.json").read_text())
        assert state["lines"] == (4, 4, 5)[number]
        expected = (ROWS[:4], [], ROWS[4:])[number]
        sent = [body for path, body in server.requests if path.endswith("/experiment/metric")]
        names = [value["metricName"] for body in sent for value in json.loads(body)["values"]]
        names = [name for name in names if name != "process duration"]
        assert sorted(names) == sorted(name for values, _, _ in expected for name in values)


def test_what_a_lost_comet_holds_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was killed, so how much arrived is not known: the resumed run makes a new and whole copy."""
    ids = []
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        server = Server()
        point_at(monkeypatch, server)
        logger = tracking.open_logger(tmp_path, comet=True, project="p", run_name="r", resume=bool(number))
        log_rows(logger, rows)
        wait_until(lambda server=server: server.comet_rows())
        if number == 0:
            logger._trackers[0]._process.kill()
        logger.close()
        ids.append(json.loads((tmp_path / "comet" / "state.json").read_text())["id"])
    assert ids[0] != ids[1]
    assert_comet(server.comet_rows(), tmp_path)


def test_scalars_of_numpy_and_torch_become_plain_numbers(tmp_path: Path) -> None:
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    logger = tracking.open_logger(tmp_path, comet=False, project="p", run_name="r")
    values = {
        "a": np.float32(0.1),
        "b": np.int64(7),
        "c": torch.tensor(0.5),
        "d": torch.tensor(3),
        "e": -math.inf,
        "f": np.float64("nan"),
        "g": 2,
    }
    before = time.time()
    logger.log(values, step=np.int64(5), epoch=torch.tensor(1.5))
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert list(row)[:3] == ["step", "epoch", "time"] and before <= row.pop("time") <= time.time()
    assert row == {
        "step": 5,
        "epoch": 1.5,
        "a": float(np.float32(0.1)),
        "b": 7,
        "c": 0.5,
        "d": 3,
        "e": "-Infinity",
        "f": "NaN",
        "g": 2,
    }
    assert isinstance(row["b"], int) and math.isnan(float(row["f"]))
    for bad in ("0.5", None, True, np.zeros(2), torch.zeros(2)):
        with pytest.raises(ValueError, match="val/f1 must be one number"):
            logger.log({"val/f1": bad}, step=6, epoch=1.5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    logger.close()


@pytest.mark.parametrize("terminal", [False, True])
def test_console(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    logger = tracking.open_logger(tmp_path, comet=False, project="p", run_name="r")
    log_rows(logger)
    logger.log({"test/f1": 0.5, "train/loss": 2}, step=4, epoch=1.0)
    logger.close()
    out, err = capsys.readouterr()
    train = ["step 1  epoch 0.25  train/loss 0.7  train/lr 1e-05  train/samples_per_second 1,234"]
    assert out == "" and err.splitlines()[0:1] == (
        ["step 4  epoch 1.00  val/accuracy 0.875  val/loss nan"] if terminal else train
    )
    assert len(err.splitlines()) == (2 if terminal else 6) and ("train/" in err) is not terminal


def test_user_errors_and_the_null_logger(tmp_path: Path) -> None:
    logger = tracking.open_logger(tmp_path, comet=False, project="p", run_name="r")
    with pytest.raises(ValueError, match="'done'"):
        logger.close("done")
    logger.close()
    logger.close()
    with pytest.raises(ValueError, match="exists already"):
        tracking.open_logger(tmp_path, comet=False, project="p", run_name="r")
    null: tracking.Logger = tracking.NullLogger()
    null.log({"a": 1.0}, step=1, epoch=0.0)
    null.log_config({})
    null.close()


def test_importing_is_cheap() -> None:
    code = "import sys, tracking; print(*{m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not set(found.split()) & {"wandb", "comet_ml", "tqdm", "numpy", "torch", "requests"}, found
