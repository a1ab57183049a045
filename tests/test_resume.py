"""A run that was stopped, anyhow and anywhere, ends as the one that was not."""

import contextlib
import json
import os
import resource
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import read_json, read_lines
from filelock import FileLock

import checkpoint
import models
import packaged
import train
from config import TrainConfig, UserError

METHODS = {
    "full": ("--finetune", "--lr", "1e-2"),
    "lora": ("--finetune", "--peft", "--lora_r", "4", "--lr", "5e-3"),
    "plain": ("--finetune", "--plain", "--lr", "1e-2"),
    "the way of a GPU": ("--finetune", "--lr", "1e-2"),
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


def whole(cli, method: str = "full", *, made: dict = {}) -> tuple:  # noqa: B006 - kept for the tests that follow
    """The outcome of the run that nothing stopped, made once for all tests of this file."""
    if method not in made:
        folder = cli.runs.with_name("whole")
        assert cli(*COMMON, *METHODS[method], "--output_dir", str(folder))[0] == 0
        made[method] = outcome(next(folder.iterdir()))
    return made[method]


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing catches it."""


@contextlib.contextmanager
def behind_step(step: int, act, monkeypatch):
    """`act()` is called behind the optimiser step of number `step`."""
    count = train.Progress.count

    def counting(self, *facts) -> None:
        count(self, *facts)
        if self.global_step == step:
            act()

    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, "count", counting)
        yield


def run_killed_at(step: int, cli, monkeypatch, *words: str) -> Path:
    """Run the command line and kill it behind the optimiser step of number `step`; returns the only run's folder."""

    def kill() -> None:
        raise Killed

    with behind_step(step, kill, monkeypatch), pytest.raises(Killed):
        cli(*words)
    (run,) = cli.runs.iterdir()
    return run


@pytest.mark.parametrize("method", METHODS)
def test_killed_twice_and_resumed_it_is_the_same_run(cli, monkeypatch, method, request):
    if method == "the way of a GPU":
        request.getfixturevalue("way_of_a_gpu")
    stopped = run_killed_at(13, cli, monkeypatch, *COMMON, *METHODS[method])  # between checkpoints
    run_killed_at(28, cli, monkeypatch, "--resume", str(stopped))
    assert not (stopped / "result.json").exists()
    assert cli("--resume", str(stopped))[0] == 0
    assert outcome(stopped) == whole(cli, method)
    assert not (stopped / "checkpoints").exists()


@pytest.mark.usefixtures("no_curves")
def test_killed_before_the_first_checkpoint_it_starts_anew(cli, monkeypatch):
    run = run_killed_at(4, cli, monkeypatch, *COMMON, *METHODS["full"])
    shutil.copytree(run, older := run.with_name("older"))
    os.utime(older / "config.json", (1, 1))
    assert cli(*COMMON, *METHODS["full"], "--resume")[0] == 0  # alone: the newest unfinished run of this config
    assert {run, older} == {*cli.runs.iterdir()} and outcome(run) == whole(cli)


def test_without_save_every_a_checkpoint_is_due_after_a_minute_and_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoint, "save", lambda *_: now.__setitem__(0, now[0] + 2.0))
    checkpoints = checkpoint.Checkpoints(tmp_path, None, Accelerator(cpu=True))
    for passed, due in ((59.0, False), (2.0, True)):
        now[0] += passed
        assert checkpoints.due(7) == due
    checkpoints.save(7, {})  # takes 2 s
    for passed, due in ((199.0, False), (2.0, True)):
        now[0] += passed
        assert checkpoints.due(8) == due


@pytest.mark.usefixtures("no_curves")
def test_a_run_that_began_on_the_packaged_default_goes_on_with_it(cli, monkeypatch, tiny_model, tiny_data):
    """Though the hub answers now, and has another model and other rows under the default's names: it is not asked."""
    expected = whole(cli)
    run = run_killed_at(13, cli, monkeypatch, *COMMON, *METHODS["full"])
    record = read_json(run / "config.json")
    source = replace(models.find_model(str(tiny_model)), kind="packaged", source="elsewhere")
    record["model"]["kind"] = record["data"]["kind"] = "packaged"
    record["data"]["name"] = packaged.REVIEWS_NAME
    record["config"] |= {"model": None, "dataset": None}
    (run / "config.json").write_text(json.dumps(record))
    monkeypatch.setattr(models, "find_model", lambda _: pytest.fail("the hub was asked"))
    monkeypatch.setattr(models, "packaged_model", lambda: source)
    monkeypatch.setattr(packaged, "reviews_folder", lambda: tiny_data / "rotten_tomatoes")
    monkeypatch.setattr("datasets.load_dataset", lambda _: pytest.fail("the hub was asked"))
    code, _, err = cli("--resume", str(run), dataset=None)
    assert code == 0, err
    assert outcome(run) == expected


def test_another_number_of_threads_is_noted_where_a_run_is_resumed(cli, monkeypatch):
    """Sums are rounded otherwise, and its times are those of neither."""
    run = run_killed_at(7, cli, monkeypatch, *COMMON, *METHODS["full"])
    monkeypatch.setenv("RUNS_AT_ONCE", "2")
    with behind_step(17, lambda: (_ for _ in ()).throw(Killed), monkeypatch), pytest.raises(Killed):
        cli("--resume", str(run))
    monkeypatch.delenv("RUNS_AT_ONCE")
    code, _, err = cli("--resume", str(run))
    began = read_json(run / "config.json")["device"]
    both = f"{began}, then {began[:-1]}, 2 runs at once)"
    assert code == 0 and f"note: this run was on {both}" in err
    assert read_json(run / "result.json")["device"] == both


def test_a_card_changed_on_the_hub_makes_no_other_model(cli, monkeypatch):
    run = run_killed_at(7, cli, monkeypatch, *COMMON, *METHODS["full"])
    record = read_json(run / "config.json")
    record["model"] |= {"source": "hub@another-revision", "license": "mit"}
    (run / "config.json").write_text(json.dumps(record))
    assert cli("--resume", str(run))[0] == 0
    assert outcome(run) == whole(cli)


def test_configs_of_other_programs_are_passed_over(cli):
    for number, content in enumerate(("{}", '{"config": null}', "[]", "no json")):
        (cli.runs / str(number)).mkdir(parents=True)
        (cli.runs / str(number) / "config.json").write_text(content)
    code, _, err = cli("--finetune", "--resume")
    assert code == 2 and "no unfinished run of this config" in err and len(err.splitlines()) == 1


def test_a_finished_run_says_so(cli):
    cli(*COMMON, *METHODS["full"])
    (run,) = cli.runs.iterdir()
    before = (run / "result.json").stat().st_mtime_ns
    code, out, _ = cli("--resume", str(run))
    assert code == 0 and "finished already" in out
    assert (run / "result.json").stat().st_mtime_ns == before


def damage(path, kind: str) -> None:
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 0x10
    bad = {"flipped": bytes(flipped), "cut": good[: len(good) // 2], "one byte short": good[:-1], "empty": b""}
    path.unlink() if kind == "deleted" else path.write_bytes(bad[kind])


DAMAGES = ("flipped", "cut", "one byte short", "empty", "deleted")


def test_every_damage_to_every_file_of_a_checkpoint_is_noticed(cli, monkeypatch, capsys, tmp_path):
    run = run_killed_at(17, cli, monkeypatch, *COMMON, *METHODS["full"])
    names = sorted(path.name for path in (run / "checkpoints" / "step-15").iterdir())
    assert names == ["manifest.json", "tensors.safetensors", "values.json"]
    for number, (name, kind) in enumerate((name, kind) for name in names for kind in DAMAGES):
        root = tmp_path / f"damaged-{number}"
        shutil.copytree(run / "checkpoints", root)
        damage(root / "step-15" / name, kind)
        capsys.readouterr()
        assert checkpoint.newest_whole(root)["progress"]["global_step"] == 10
        assert "step-15" in capsys.readouterr().err


@pytest.mark.usefixtures("no_curves")
def test_a_run_survives_a_damaged_checkpoint(cli, monkeypatch):
    stopped = run_killed_at(17, cli, monkeypatch, *COMMON, *METHODS["full"])
    for name, kind in (("tensors.safetensors", "flipped"), ("values.json", "cut"), ("manifest.json", "deleted")):
        run = stopped.with_name(kind)
        shutil.copytree(stopped, run)
        damage(run / "checkpoints" / "step-15" / name, kind)
        code, _, err = cli("--resume", str(run))
        assert code == 0 and "warning: damaged checkpoint" in err and "step-15" in err and "at step 10" in err
        assert outcome(run) == whole(cli)


def test_damaged_checkpoints_of_later_steps_do_not_outlive_a_whole_one(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"a": torch.ones(3)})
    (tmp_path / "step-2" / "values.json").write_text("{}")
    checkpoint.save(tmp_path, 3, {"a": torch.ones(3)})  # before it is known that step-2 is damaged
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-3"}
    (tmp_path / "step-3" / "values.json").write_text("{}")
    checkpoint.save(tmp_path, 1, {"a": torch.ones(3)})  # a run that began anew
    assert {path.name for path in tmp_path.iterdir()} == {"step-1"}


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


@contextlib.contextmanager
def file_size_limit(most: int):
    """No file of this process can grow beyond `most` bytes: the system's own answer to a write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def run_with_full_disk_from(step: int, most, cli, monkeypatch, *words: str) -> tuple[int, str, str]:
    """The run, with no file growing beyond `most()` bytes from behind optimiser step `step` on."""
    with contextlib.ExitStack() as until_the_end:
        enter = until_the_end.enter_context
        enter(behind_step(step, lambda: enter(file_size_limit(most())), monkeypatch))
        return cli(*words)


@pytest.mark.parametrize(("what", "step", "kept"), [("checkpoint", 8, 5), ("log line", 17, 15), ("model", 36, 35)])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(cli, monkeypatch, what, step, kept):
    run = cli.runs / "rotten_tomatoes-full-0.01-seed42"
    log = run / "metrics.jsonl"
    # less than a checkpoint; a line that is cut in the middle; less than a model, but room for the log
    most = {"checkpoint": lambda: 10_000, "log line": lambda: log.stat().st_size + 20, "model": lambda: 10_000}[what]
    code, _, err = run_with_full_disk_from(step, most, cli, monkeypatch, *COMMON, *METHODS["full"])
    line = err.strip().splitlines()[-1]
    named = {
        "checkpoint": f"step 10 cannot be written to {run}",
        "log line": f"{log}: the line of step 20",
        "model": str(run),
    }
    assert code == 2 and line.startswith("error: ") and named[what] in line and "Traceback" not in err
    assert "File too large" in line
    assert checkpoint.newest_whole(run / "checkpoints")["progress"]["global_step"] == kept
    assert not (run / "result.json").exists()
    assert cli("--resume", str(run))[0] == 0  # there is room again
    assert outcome(run) == whole(cli)


def test_a_disk_full_from_the_start_leaves_no_run_folder(cli):
    with file_size_limit(100):
        code, _, err = cli(*COMMON, *METHODS["full"])
    assert code == 2 and len(err.strip().splitlines()) == 1 and "cannot be written" in err
    assert not list(cli.runs.glob("*"))


@pytest.mark.usefixtures("no_curves")
def test_a_run_that_is_still_going_on_is_not_resumed(cli, monkeypatch):
    run = run_killed_at(7, cli, monkeypatch, *COMMON, *METHODS["full"])
    before = (run / "metrics.jsonl").read_bytes()
    with FileLock(run / ".lock"):
        code, _, err = cli("--resume", str(run))
    assert code == 2 and "another process is still at work" in err.strip().splitlines()[-1]
    assert (run / "metrics.jsonl").read_bytes() == before
    assert cli("--resume", str(run))[0] == 0
    assert not (run / ".lock").exists()


def test_a_run_that_another_process_finished_meanwhile_stays_as_it_is(cli, monkeypatch):
    assert cli("--finetune", "--epochs", "1")[0] == 0
    (run,) = cli.runs.iterdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr("runs.find_resumable", lambda config: config)  # it looked before the other one was done
    code, _, err = cli("--resume", str(run), dataset=None)
    assert code == 2 and err.strip().splitlines()[-1].endswith("another process has just finished this run")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_runs_that_start_together_get_folders_of_their_own(tmp_path):
    import runs

    config = TrainConfig(output_dir=str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: runs.create_run_dir(config, "d"), range(40)))
    assert len(set(made)) == 40 and set(made) == set(tmp_path.iterdir())


@pytest.mark.usefixtures("no_curves")
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


@pytest.mark.usefixtures("no_curves")
def test_steps_that_are_all_skipped_have_no_loss(cli, monkeypatch):
    """A window of them would have the sum of nothing: 0."""
    import engine

    forward, calls = engine.FastEngine.forward, []

    def poisoned(self, batch):
        calls.append(0)
        return forward(self, batch) * (float("nan") if 10 < len(calls) <= 12 else 1.0)

    monkeypatch.setattr(engine.FastEngine, "forward", poisoned)
    assert (
        cli(*COMMON, *METHODS["full"], "--on_nan", "skip")[0] == 0
    )  # a line at step 10 and at step 12, the epoch's end
    (run,) = cli.runs.iterdir()
    lines = {line["step"]: line for line in read_lines(run / "metrics.jsonl") if "train/lr" in line}
    assert "train/loss" not in lines[12] and all(lines[step]["train/loss"] > 0 for step in (10, 20))


def test_a_run_from_before_a_flag_was_there_goes_on(cli, monkeypatch):
    run = run_killed_at(26, cli, monkeypatch, *COMMON, *METHODS["full"])
    record = read_json(run / "config.json")
    del record["config"]["truncation"], record["data"]["text_column"]
    (run / "config.json").write_text(json.dumps(record))
    assert cli(*COMMON, *METHODS["full"], "--resume")[0] == 0 and (run / "result.json").exists()


@pytest.mark.usefixtures("no_curves")
def test_a_run_that_began_with_other_code_is_noted_and_a_finished_one_keeps_no_checkpoint(cli, monkeypatch):
    run = run_killed_at(13, cli, monkeypatch, *COMMON, *METHODS["full"])
    record = read_json(run / "config.json")
    record["versions"]["torch"] = "1.0"
    (run / "config.json").write_text(json.dumps(record))
    shutil.copytree(run / "checkpoints", run.parent / "kept")
    code, _, err = cli("--resume", str(run), "--output_dir", record["config"]["output_dir"])
    assert code == 0 and "note: this run began with torch 1.0:" in err
    assert read_json(run / "result.json")["began_with"] == ["torch 1.0"]
    (run.parent / "kept").rename(run / "checkpoints")  # as if it had been stopped before they were deleted
    assert cli("--resume", str(run))[0] == 0 and not (run / "checkpoints").exists()


def test_a_baseline_is_not_resumed_and_its_record_not_blamed(cli):
    assert cli("--baseline")[0] == 0
    (run,) = cli.runs.iterdir()
    code, _, err = cli("--resume", str(run), dataset=None)
    assert code == 2 and err.startswith("error: --resume goes with --finetune")


@pytest.mark.usefixtures("no_curves")
def test_a_run_that_moved_is_resumed_by_its_new_name_under_home(cli, monkeypatch, tmp_path):
    run = run_killed_at(13, cli, monkeypatch, *COMMON, *METHODS["full"])
    (tmp_path / "home").mkdir()
    moved = run.rename(tmp_path / "home" / "run")
    cli.runs.rmdir()
    cli.runs.touch()  # nothing can be written where it was once made
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cli("--resume=~/run")[0] == 0
    assert outcome(moved) == whole(cli)


def test_a_checkpoint_from_before_losses_broke_ties_is_read(cli, monkeypatch):
    run = run_killed_at(26, cli, monkeypatch, *COMMON, *METHODS["full"])  # two of three epochs are validated
    state = checkpoint.newest_whole(run / "checkpoints")
    step, best = state["progress"]["global_step"], state["progress"]["best_epoch"]
    del state["progress"]["best_loss"]
    checkpoint.save(run / "checkpoints", step, state)
    same = {"accuracy": state["progress"]["best_accuracy"], "loss": 0.0}  # its tie stays with the earlier epoch
    monkeypatch.setattr(train, "score", lambda *_: same)
    code, _, err = cli("--resume", str(run))
    assert code == 0, err
    assert read_json(run / "result.json")["best_epoch"] == best
