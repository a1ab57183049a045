"""Signals: a run stops where it is, says how it goes on, and ends as one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_resume import COMMON, METHODS, behind_step, outcome, whole

import checkpoint
import train
from config import Interrupted


def newest_step(runs: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in runs.glob("*/checkpoints/step-*")), default=0)


def test_signals_to_the_real_process(cli, tiny_model, tiny_data):
    """One run is stopped in each way, goes on each time from where it was stopped, and is finished."""
    words = ["--finetune", "--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes")]
    words += ["--batch_size", "4", "--save_every", "20", "--output_dir", str(cli.runs)]
    resuming = ""
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        before = newest_step(cli.runs)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "main.py"), *words, "--epochs", "40"], stderr=subprocess.PIPE, text=True
        )
        while newest_step(cli.runs) == before:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and resuming in err and "Traceback" not in err
        (run,) = cli.runs.iterdir()
        step = checkpoint.newest_whole(run / "checkpoints")["progress"]["global_step"]
        if number != signal.SIGKILL:
            assert err.strip().splitlines()[-1] == f"stopped at step {step}; to go on: python main.py --resume {run}"
        words, resuming = ["--resume", str(run)], f"resuming at step {step}"
    code, _, err = cli(*words, "--epochs", "40", dataset=None)
    assert code == 0, err
    assert resuming in err


def gone(descriptor: int, _: bytes) -> int:
    """`os.write` where the reader of stderr has gone: Ctrl-C ends `tee`, too."""
    assert descriptor == 2
    raise BrokenPipeError


@pytest.mark.usefixtures("no_curves")
def test_a_stop_that_nobody_can_read_of_has_its_checkpoint(cli, monkeypatch):
    def stop() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.os, "write", gone)
            os.kill(os.getpid(), signal.SIGINT)

    with behind_step(17, stop, monkeypatch):
        assert cli(*COMMON, *METHODS["full"])[0] == 130
    (run,) = cli.runs.iterdir()
    assert checkpoint.newest_whole(run / "checkpoints")["progress"]["global_step"] == 17


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(cli, monkeypatch, number, code):
    """Both come within one step, so only a stop before its end has no checkpoint of it."""
    with behind_step(17, lambda: (os.kill(os.getpid(), number), os.kill(os.getpid(), number)), monkeypatch):
        stopped = cli(*COMMON, *METHODS["full"])
    (run,) = cli.runs.iterdir()
    assert stopped[0] == code
    assert stopped[2].strip().splitlines()[-1] == f"stopped at once; to go on: python main.py --resume {run}"
    assert checkpoint.newest_whole(run / "checkpoints")["progress"]["global_step"] == 15


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("when", ["while test is scored", "while the model is saved"])
def test_a_signal_behind_the_last_step_stops_at_once_and_the_run_goes_on_later(cli, monkeypatch, when):
    name, module = {
        "while test is scored": ("score_with_intervals", train),
        "while the model is saved": ("save_model", train.models),
    }[when]
    right = getattr(module, name)

    def interrupted(*facts):
        os.kill(os.getpid(), signal.SIGTERM)
        return right(*facts)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        code, _, err = cli(*COMMON, *METHODS["full"])
    (run,) = cli.runs.iterdir()
    assert code == 143 and f"--resume {run}" in err.strip().splitlines()[-1]
    assert not (run / "result.json").exists()
    assert cli("--resume", str(run))[0] == 0
    assert outcome(run) == whole(cli)


def test_a_signal_between_the_last_step_and_its_end_is_not_lost(tmp_path):
    with checkpoint.GracefulStop(tmp_path) as stop:
        stop.open_loop()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as told:
            stop.close_loop()
    assert told.value.exit_code == 143
