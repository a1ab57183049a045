"""tracking.py with the real wandb and comet_ml: offline, and online with servers on this machine."""

import json
import math
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, command, read_json
from filelock import FileLock
from standin_trackers import (
    COMET_KEY,
    HF_TOKEN,
    ROWS,
    WANDB_KEY,
    Server,
    assert_comet,
    assert_no_secret,
    assert_wandb,
    comet_offline,
    heard,
    log_rows,
    open_run,
    point_at,
    wandb_offline,
)

import tracker_process
import tracking

pytestmark = pytest.mark.usefixtures("clean_machine")


def test_scalars_of_numpy_and_torch_become_plain_numbers(tmp_path):
    import numpy as np
    import torch

    logger = open_run(tmp_path, comet=False)
    numbers = {  # what is given and what is written
        "a": (np.float32(0.1), float(np.float32(0.1))),
        "b": (np.int64(7), 7),
        "c": (torch.tensor(0.5), 0.5),
        "d": (torch.tensor(3), 3),
        "e": (-math.inf, "-Infinity"),
        "f": (np.float64("nan"), "NaN"),
        "g": (2, 2),
    }
    before = time.time()
    logger.log({key: given for key, (given, _) in numbers.items()}, step=np.int64(5), epoch=torch.tensor(1.5))
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert list(row)[:3] == ["step", "epoch", "time"] and before <= row.pop("time") <= time.time()
    assert row == {"step": 5, "epoch": 1.5} | {key: right for key, (_, right) in numbers.items()}
    assert isinstance(row["b"], int) and math.isnan(float(row["f"]))
    for bad in ("0.5", None, True, np.zeros(2), torch.zeros(2)):
        with pytest.raises(ValueError, match="val/f1 must be one number"):
            logger.log({"val/f1": bad}, step=6, epoch=1.5)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    logger.close()


@pytest.mark.parametrize("terminal", [False, True])
def test_console(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    logger = open_run(tmp_path, comet=False)
    log_rows(logger)
    logger.log({"test/f1": 0.5, "train/loss": 2}, step=4, epoch=1.0)
    logger.close()
    out, err = capsys.readouterr()
    train = "step 1  epoch 0.25  train/loss 0.7  train/lr 1e-05  train/samples_per_second 1,234"
    scores = "step 4  epoch 1.00  val/accuracy 0.875  val/loss nan"
    assert out == "" and err.splitlines()[0] == (scores if terminal else train)
    assert len(err.splitlines()) == (2 if terminal else 6) and ("train/" in err) is not terminal


def test_user_errors_and_the_null_logger(tmp_path):
    logger = open_run(tmp_path, comet=False)
    with pytest.raises(ValueError, match="'done'"):
        logger.close("done")
    logger.close()
    logger.close()
    with pytest.raises(ValueError, match="exists already"):
        open_run(tmp_path, comet=False)
    null: tracking.Logger = tracking.NullLogger()
    null.log({"a": 1.0}, step=1, epoch=0.0)
    null.log_config({})
    null.close()


def test_importing_is_cheap():
    code = "import sys, tracking; print(*{m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not set(found.split()) & {"wandb", "comet_ml", "tqdm", "numpy", "torch", "requests"}, found


def test_without_keys_both_record_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", Server().url)
    lines = heard(monkeypatch)
    logger = open_run(tmp_path, wandb=True, comet=True)
    log_rows(logger)
    logger.close("interrupted")
    assert_wandb(wandb_offline(tmp_path)[0], tmp_path)
    assert_comet(comet_offline(tmp_path)[0], tmp_path)
    assert wandb_offline(tmp_path)[2] == 130 and comet_offline(tmp_path)[2] == "interrupted"
    notes = [line for line in lines if "offline" in line]
    assert len(notes) == 2 and all("API key" in line for line in notes), notes


def test_comet_is_on_where_a_key_is_configured(tmp_path, monkeypatch):
    def trackers(name: str, comet: bool | None) -> list[str]:
        logger = open_run(tmp_path / name, comet=comet)
        logger.close()
        return [tracker._spec["tracker"] for tracker in logger._trackers]

    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.0)
    assert trackers("none", None) == []
    point_at(monkeypatch, None)
    assert trackers("off", False) == []
    assert trackers("on", None) == ["comet"]


def test_a_config_file_without_a_key_leaves_comet_off(tmp_path, monkeypatch):
    (tmp_path / "settings").write_text("[comet]\nworkspace=w\n")
    monkeypatch.setenv("COMET_CONFIG", str(tmp_path / "settings"))
    lines = heard(monkeypatch)
    logger = open_run(tmp_path / "run")
    logger.close()
    assert lines == [] and not list((tmp_path / "run").rglob("*.zip"))


def test_resume_continues_the_online_runs(tmp_path, monkeypatch):
    servers = [Server(), Server()]
    for resume, (server, rows) in enumerate(zip(servers, (ROWS[:3], ROWS[3:]))):
        point_at(monkeypatch, server)
        monkeypatch.setenv("WANDB_PROJECT", ("where it began", "elsewhere")[resume])
        logger = open_run(tmp_path, wandb=True, resume=bool(resume))
        log_rows(logger, rows)
        logger.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 99, "tra' * (1 - resume))  # as a killed run leaves it
    ids = {read_json(tmp_path / name / "state.json")["id"] for name in ("wandb", "comet")}
    assert servers[0].runs() == servers[1].runs() == ids
    assert set(servers[1].wandb_rows()) == set(servers[1].comet_rows()) == {4}  # only what was new
    asked = b"".join(body for server in servers for path, body in server.requests if path == "/graphql")
    assert b"where it began" in asked and b"elsewhere" not in asked
    assert_wandb(servers[0].wandb_rows() | servers[1].wandb_rows(), tmp_path)
    assert_comet(servers[0].comet_rows() | servers[1].comet_rows(), tmp_path)
    assert_no_secret(tmp_path)


def test_a_resumed_run_sends_no_line_twice(tmp_path, monkeypatch):
    """The copy of a killed run holds lines that the resumed one cuts and writes again; so does a copy with a part."""
    for number, (kept, rows) in enumerate(((0, ROWS[:4]), (2, ROWS[2:3]), (3, ROWS[3:]))):
        server = Server()
        point_at(monkeypatch, server)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)[:kept] if number else []
        (tmp_path / "metrics.jsonl").write_text("".join(lines)) if number else None  # cut back to the checkpoint
        logger = open_run(tmp_path, wandb=True, resume=bool(number))
        log_rows(logger, rows)
        logger.close()
        state = read_json(tmp_path / "comet" / "state.json")
        assert state["lines"] == (4, 4, 5)[number]
        expected = (ROWS[:4], [], ROWS[4:])[number]
        sent = [body for path, body in server.requests if path.endswith("/experiment/metric")]
        names = [value["metricName"] for body in sent for value in json.loads(body)["values"]]
        names = [name for name in names if name != "process duration"]
        assert sorted(names) == sorted(name for values, _, _ in expected for name in values)


def test_a_step_that_wandb_would_drop_is_moved():
    """A resumed run of W&B begins behind its last step, whose other lines may be new."""
    logged = []
    tracker = object.__new__(tracker_process._Wandb)
    tracker._run, tracker._first_step = SimpleNamespace(log=lambda values, step: logged.append((step, values))), 5
    for step in (2, 4, 5, 9):  # the first is there already
        tracker.log({"step": step, "epoch": 1.0, "time": 7.0, "val/accuracy": 0.5})
    assert [step for step, _ in logged] == [5, 5, 9]
    assert logged[0][1] == {"epoch": 1.0, "_timestamp": 7.0, "val/accuracy": 0.5}


def test_a_process_that_still_uploads_is_not_joined_by_another(tmp_path, monkeypatch):
    point_at(monkeypatch, server := Server())
    log_rows(logger := open_run(tmp_path, comet=False))
    logger.close()
    (tmp_path / "config.json").write_text(json.dumps({"config": {"wandb": True, "comet": False}}))
    (tmp_path / "wandb").mkdir()
    lines: list[str] = []
    syncing = threading.Thread(target=lambda: lines.extend(tracking.sync(tmp_path)))
    with FileLock(tmp_path / "wandb" / ".lock"):
        syncing.start()
        time.sleep(4)
        assert not server.requests
    syncing.join()
    assert lines[-1].startswith("W&B: complete at") and len(server.runs()) == 1


def test_sync_on_the_command_line(tmp_path, monkeypatch):
    def main(*words: str) -> tuple[int, list[str], str]:
        done = command("--sync", *words)
        lines = [line.split(", ")[0].split(" http")[0] for line in done.stdout.splitlines()]
        return done.returncode, lines, done.stderr

    run_dir, empty, server = tmp_path / "run", tmp_path / "empty", Server()
    empty.mkdir()
    logger = open_run(run_dir, comet=False)
    log_rows(logger)
    logger.close()
    point_at(monkeypatch, server)
    (run_dir / "config.json").write_text(json.dumps({"config": {"wandb": False, "comet": None}}))
    for folder, why in ((empty, "no metrics.jsonl"), (tmp_path / "gone", "no metrics.jsonl"), (run_dir, "--wandb")):
        code, out, err = main(str(folder))
        assert (code, out) == (2, []) and err.count("\n") == 1, err
        assert err.startswith("error: ") and str(folder) in err and why in err
    (run_dir / "config.json").write_text(json.dumps({"config": {"wandb": True, "comet": None, "project": "mine"}}))
    with FileLock(run_dir / ".lock"):  # as a run that is still training: two copies of it would be made
        code, out, err = main(str(run_dir))
    assert (code, out, err.count("\n")) == (2, [], 1) and "still at work" in err
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that is filled by the first run with secrets around it: the kernels are compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("online", [True, False])
def test_no_secret_of_the_environment_reaches_a_file_or_the_screen(
    tiny_model, tiny_data, tmp_path, monkeypatch, cache, online
):
    """A whole run of the command line with both trackers: its folder, the cache, and what it prints."""
    point_at(monkeypatch, Server() if online else None)
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)
    monkeypatch.setenv("DISTILBERT_SENTIMENT_CACHE", str(cache))
    where = ["--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes")]
    where += ["--output_dir", str(tmp_path / "runs"), "--epochs", "1"]
    done = command("--finetune", "--wandb", *where)
    assert done.returncode == 0, done.stderr
    assert "recording to" in done.stderr if online else done.stderr.count("recording offline") == 2
    assert len(list(tmp_path.rglob("wandb/*run-*"))) == len(list(tmp_path.rglob("comet/state.json"))) == 1
    assert_no_secret(tmp_path)
    assert_no_secret(cache)
    said = done.stdout + done.stderr
    assert not [secret for secret in (WANDB_KEY, COMET_KEY, HF_TOKEN) if secret[3:] in said]
