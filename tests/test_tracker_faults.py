"""Trackers whose servers refuse, hang or fail, or whose process is killed: what a run says, waits for and keeps."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, read_json
from standin_trackers import (
    ROWS,
    Server,
    assert_comet,
    assert_no_secret,
    assert_wandb,
    comet_offline,
    heard,
    log_rows,
    open_run,
    point_at,
    wait_until,
    wandb_offline,
)

import tracking

pytestmark = pytest.mark.usefixtures("clean_machine")


@dataclass
class Outcome:
    run_dir: Path
    lines: list[str]
    open_seconds: float
    slowest_log: float
    close_seconds: float


MODES = ("hang", "500", "late-hang", "late-500")
SCENARIOS = {"refuse": None, **dict(zip(MODES, MODES)), "mid-hang": "ok", "mid-500": "ok"}


@pytest.fixture(scope="module")
def outcomes(clean_machine, tmp_path_factory) -> dict[str, Outcome]:
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
            outcome = done[name] = Outcome(tmp_path_factory.mktemp(name), heard(env), 0.0, 0.0, 0.0)
            start = time.perf_counter()
            logger = open_run(outcome.run_dir, wandb=True)
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
def test_no_server_costs_the_run_more_than_its_limits(outcomes, name):
    outcome = outcomes[name]
    assert outcome.open_seconds < 1.0
    assert outcome.slowest_log < 0.5
    assert outcome.close_seconds < 30.0
    assert len((outcome.run_dir / "metrics.jsonl").read_text().splitlines()) == len(ROWS)
    assert_no_secret(outcome.run_dir)


@pytest.mark.parametrize("name", ["refuse", *MODES])
def test_offline_copies_are_exact(outcomes, name):
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
def test_a_server_lost_on_the_way_is_one_warning_each(outcomes, name):
    warnings = [line for line in outcomes[name].lines if line.startswith("warning: ")]
    assert sorted(line.split(":")[1] for line in warnings) == [" Comet", " W&B"], warnings
    assert all("python main.py --sync" in line for line in warnings)
    for tracker in ("wandb", "comet"):  # not taken for whole
        assert "lines" not in read_json(outcomes[name].run_dir / tracker / "state.json")


def test_the_upload_commands_that_were_printed_work(outcomes, tmp_path, monkeypatch):
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


def test_sync_rebuilds_both_copies_once(outcomes, tmp_path, monkeypatch):
    run_dir = outcomes["mid-500"].run_dir
    unsure = {read_json(run_dir / name / "state.json")["id"] for name in ("wandb", "comet")}
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


def test_a_tracker_that_hangs_is_killed(tmp_path, monkeypatch):
    point_at(monkeypatch, Server("hang"))
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.5)
    lines = heard(monkeypatch)
    logger = open_run(tmp_path, wandb=True, comet=True)
    start = time.perf_counter()
    logger.close("failed")
    assert time.perf_counter() - start < 3.0
    assert sum("did not finish and was given up" in line for line in lines) == 2
    assert all(tracker._process.poll() is not None for tracker in logger._trackers)


def test_a_tracker_that_dies_is_one_warning(tmp_path, monkeypatch, capfd):
    logger = open_run(tmp_path, wandb=True, comet=False)
    logger._trackers[0]._process.kill()
    logger._trackers[0]._process.wait()
    logger.log_config({"lr": 2e-5})
    log_rows(logger, ROWS[:1])
    logger.close()
    del logger
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("step ")]
    assert len(lines) == 1 and lines[0].startswith("warning: W&B did not finish and was given up"), lines


def test_copies_are_finished_when_training_is_killed(tmp_path, monkeypatch):
    point_at(monkeypatch, None)
    script = (
        "import sys, time; sys.path[:0] = sys.argv[2:]; import pathlib, standin_trackers as t\n"
        "logger = t.open_run(pathlib.Path(sys.argv[1]), wandb=True)\n"
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


def test_what_a_lost_comet_holds_is_not_guessed(tmp_path, monkeypatch):
    """Its process was killed, so how much arrived is not known: the resumed run makes a new and whole copy."""
    ids = []
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        server = Server()
        point_at(monkeypatch, server)
        logger = open_run(tmp_path, comet=True, resume=bool(number))
        log_rows(logger, rows)
        wait_until(lambda server=server: server.comet_rows())
        if number == 0:
            logger._trackers[0]._process.kill()
        logger.close()
        ids.append(read_json(tmp_path / "comet" / "state.json")["id"])
    assert ids[0] != ids[1]
    assert_comet(server.comet_rows(), tmp_path)
