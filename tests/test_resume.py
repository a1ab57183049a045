"""A run that was stopped, anyhow and anywhere, ends as the one that was not."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, read_json, read_lines

import checkpoint
import train
from config import UserError

METHODS = {
    "full": ("--finetune", "--lr", "1e-2"),
    "lora": ("--finetune", "--peft", "--lora_r", "4", "--lr", "5e-3"),
    "plain": ("--finetune", "--plain", "--lr", "1e-2"),
    "accumulation": ("--finetune", "--gradient_accumulation_steps", "3", "--batch_size", "2"),
}
COMMON = ("--epochs", "3", "--batch_size", "8", "--save_every", "5")
STEPS = 36


def outcome(run) -> tuple:
    """All that must be the same: weights, metrics but for times and rates, test scores and predictions."""
    lines = read_lines(run / "metrics.jsonl")
    for line in lines:
        line.pop("time"), line.pop("train/samples_per_second", None)
    weights = {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
    assert weights
    result = read_json(run / "result.json")
    return weights, lines, result["val"], result["test"], (run / "predictions.jsonl").read_text()


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing catches it."""


def run_killed_at(step: int, cli, monkeypatch, *words: str) -> None:
    """Run the command line and kill it behind the optimiser step of number `step`."""
    count = train.Progress.count

    def counting(self, *facts) -> None:
        count(self, *facts)
        if self.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, "count", counting)
        with pytest.raises(Killed):
            cli(*words)


@pytest.mark.parametrize("method", METHODS)
def test_killed_twice_and_resumed_it_is_the_same_run(cli, monkeypatch, method):
    assert cli(*COMMON, *METHODS[method])[0] == 0
    (whole,) = cli.runs.iterdir()
    stopped = whole.with_name(whole.name + "-2")
    for step, words in ((13, COMMON + METHODS[method]), (28, ("--resume", str(stopped)))):  # between checkpoints
        run_killed_at(step, cli, monkeypatch, *words)
        assert not (stopped / "result.json").exists()
    assert cli("--resume", str(stopped))[0] == 0
    assert outcome(stopped) == outcome(whole)
    assert not (stopped / "checkpoints").exists()


def test_killed_before_the_first_checkpoint_it_starts_anew(cli, monkeypatch):
    assert cli(*COMMON, *METHODS["full"])[0] == 0
    (whole,) = cli.runs.iterdir()
    stopped = whole.with_name(whole.name + "-2")
    run_killed_at(4, cli, monkeypatch, *COMMON, *METHODS["full"])
    assert cli(*COMMON, *METHODS["full"], "--resume")[0] == 0  # alone: the newest unfinished run of this config
    assert outcome(stopped) == outcome(whole)


def test_a_finished_run_says_so(cli):
    cli(*COMMON, *METHODS["full"])
    (run,) = cli.runs.iterdir()
    before = (run / "result.json").stat().st_mtime_ns
    code, out, _ = cli("--resume", str(run))
    assert code == 0 and "finished already" in out
    assert (run / "result.json").stat().st_mtime_ns == before


def test_another_config_is_refused_by_the_names_that_differ(cli, monkeypatch):
    run_killed_at(7, cli, monkeypatch, *COMMON, *METHODS["full"])
    (run,) = cli.runs.iterdir()
    code, _, err = cli("--resume", str(run), "--lr", "0.5", "--seed", "7")
    assert code == 2 and "lr was 0.01, given 0.5" in err and "seed was 42, given 7" in err
    code, _, err = cli("--finetune", "--lr", "0.5", "--resume")
    assert code == 2 and "no unfinished run of this config" in err
    for nothing in (str(run.parent), "nowhere"):
        code, _, err = cli("--resume", nothing)
        assert code == 2 and "--resume" in err and len(err.strip().splitlines()) == 1


def test_damaged_checkpoints_are_noticed_and_the_one_before_is_used(cli, monkeypatch, capsys):
    assert cli(*COMMON, *METHODS["full"])[0] == 0
    (whole,) = cli.runs.iterdir()
    stopped = whole.with_name(whole.name + "-2")
    run_killed_at(17, cli, monkeypatch, *COMMON, *METHODS["full"])
    newest = stopped / "checkpoints" / "step-15"
    assert (stopped / "checkpoints" / "step-10").is_dir()
    for name in ("tensors.safetensors", "values.json", "manifest.json"):
        good = (newest / name).read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 0x10
        for bad in (good[:-1], good[: len(good) // 2], b"", bytes(flipped), None):
            (newest / name).unlink()
            if bad is not None:
                (newest / name).write_bytes(bad)
            capsys.readouterr()
            assert checkpoint.newest_whole(stopped / "checkpoints")["progress"]["global_step"] == 10
            assert "step-15" in capsys.readouterr().err
            (newest / name).write_bytes(good)
    (newest / "tensors.safetensors").write_bytes(b"")
    code, _, err = cli("--resume", str(stopped))
    assert code == 0 and "warning: damaged checkpoint" in err and "step-15" in err
    assert outcome(stopped) == outcome(whole)


def test_all_damaged_is_an_error_and_nothing_is_deleted(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"a": torch.ones(3)})
        (tmp_path / f"step-{step}" / "values.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.newest_whole(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2"}


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path):
    state = {
        "tensors": {"a": torch.arange(6.0).view(2, 3).bfloat16(), "b": torch.tensor(1.5)},
        "list": [1, None, "x", True, {"deep": torch.ones(2, dtype=torch.int64)}],
        "numbers": {0: 0.1, 7: float("-inf")},
    }
    checkpoint.save(tmp_path, 3, state)
    back = checkpoint.newest_whole(tmp_path)
    assert back["numbers"] == state["numbers"] and back["list"][:4] == state["list"][:4]
    for name, tensor in state["tensors"].items():
        assert torch.equal(back["tensors"][name], tensor) and back["tensors"][name].dtype == tensor.dtype
    for step in (4, 5, 6):
        checkpoint.save(tmp_path, step, state)
    assert {path.name for path in tmp_path.iterdir()} == {"step-5", "step-6"}


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(cli, monkeypatch):
    save_file = checkpoint.save_file

    def full(tensors, path) -> None:
        if path.parent.name == ".step-10.tmp":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, _, err = cli(*COMMON, *METHODS["full"])
    (run,) = cli.runs.iterdir()
    assert code == 2 and "No space left" in err.strip().splitlines()[-1] and "Traceback" not in err
    assert checkpoint.newest_whole(run / "checkpoints")["progress"]["global_step"] == 5
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    assert cli("--resume", str(run))[0] == 0


@pytest.mark.parametrize("plain", [(), ("--plain",)])
def test_a_gradient_that_is_not_finite_stops_the_run_or_is_skipped(cli, monkeypatch, plain):
    import engine

    kind = engine.PlainEngine if plain else engine.FastEngine
    forward, calls = kind.forward, []

    def poisoned(self, batch):
        calls.append(0)
        return forward(self, batch) * (float("nan") if len(calls) == 8 else 1.0)

    monkeypatch.setattr(kind, "forward", poisoned)
    code, _, err = cli(*COMMON, *METHODS["full"], *plain)
    (run,) = cli.runs.iterdir()
    line = err.strip().splitlines()[-1]
    assert code == 2 and "not finite at step 8" in line and "learning rate" in line and "rows" in line
    state = checkpoint.newest_whole(run / "checkpoints")
    assert state["progress"]["global_step"] == 5
    assert all(weight.isfinite().all() for weight in state["weights"].values())

    calls.clear()
    assert cli(*COMMON, *METHODS["full"], *plain, "--on_nan", "skip")[0] == 0
    result = read_json(run.with_name(run.name + "-2") / "result.json")
    assert result["skipped_steps"] == 1 and result["test"]["loss"] < 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_signals_to_the_real_process(tiny_model, tiny_data, tmp_path, number, code):
    words = ["--finetune", "--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"), "--epochs"]
    words += ["40", "--batch_size", "4", "--save_every", "20", "--output_dir", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *words], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    while not list(tmp_path.glob("*/checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    (run,) = tmp_path.iterdir()
    step = checkpoint.newest_whole(run / "checkpoints")["progress"]["global_step"]
    if number != signal.SIGKILL:
        assert err.strip().splitlines()[-1] == f"stopped at step {step}; to go on: python main.py --resume {run}"
    again = command("--resume", str(run), "--epochs", "40")
    assert again.returncode == 0, again.stderr
    assert f"resuming at step {step}" in again.stderr
