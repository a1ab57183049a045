"""Grids and sweeps: what a file stands for, what is skipped, resumed and tried again, and how a sweep stops."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from conftest import ROOT, command, read_json
from test_signals import gone

from config import TrainConfig, UserError, parse_args
from grid import cell_names, command_words, identity, read_grid
from pools import ForwardSignals, LocalPool

GRID = """
seeds = [1, 2]
[defaults]
dataset = {data!r}
model = {model!r}
epochs = 1
limit = 32
[[cell]]
method = "full"
[[cell]]
method = "lora"
lora_r = 2
lr = [1e-3, 5e-4]
seeds = [1]
"""


def written(tmp_path, text: str):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return path


@pytest.fixture
def grid(tmp_path, tiny_model, tiny_data):
    """The file of four tiny runs."""
    return written(tmp_path, GRID.format(data=str(tiny_data / "rotten_tomatoes"), model=str(tiny_model)))


@pytest.fixture(scope="module")
def swept(tiny_model, tiny_data, tmp_path_factory):
    """(file, folder, what was said) of a sweep of three runs of one kind, two at a time."""
    folder = tmp_path_factory.mktemp("swept")
    text = GRID.replace('"lora"\nlora_r = 2', '"full"').replace("[1e-3, 5e-4]", "1e-3")
    file = written(folder, text.format(data=str(tiny_data / "rotten_tomatoes"), model=str(tiny_model)))
    words = ("--sweep", str(file), "--output_dir", str(folder / "runs"), "--device", "cpu", "--workers", "2")
    done = command(*words, timeout=200)
    assert done.returncode == 0, done.stderr
    return file, folder / "runs" / "grid", done.stderr


def test_lists_are_expanded_seed_by_seed_in_the_order_of_the_file(grid):
    found = [(run.method, run.lr, run.seed) for run in read_grid(grid, {})]
    assert found == [("full", 2e-5, 1), ("full", 2e-5, 2), ("lora", 1e-3, 1), ("lora", 5e-4, 1)]


def test_flags_beside_the_file_hold_for_every_cell(grid):
    runs = read_grid(grid, {"epochs": 7, "seed": 9})
    assert {(run.epochs, run.seed) for run in runs} == {(7, 9)}
    assert len(runs) == 3  # the two seeds of the first cell are one now


def test_command_words_parse_back_to_the_same_config(grid):
    extreme = TrainConfig(comet=False, wandb=True, peft=True, lora_layers=1, lr=1e-7, project="-x y", limit=3)
    for config in [*read_grid(grid, {}), TrainConfig(mode="baseline", dataset="sst2"), extreme]:
        assert parse_args(command_words(config)) == config


def test_identity_is_what_is_computed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = asdict(TrainConfig(dataset_dir="data", output_dir="a", device="cpu"))
    assert identity(one) == identity(asdict(TrainConfig(dataset_dir=str(tmp_path / "data"))))
    assert identity(one) == identity(json.loads(json.dumps(one)))
    assert identity(one) != identity({**one, "lr": 1e-5})
    del one["on_nan"]  # a record from before the flag
    assert identity(one) == identity({**one, "on_nan": "stop"})


def test_names_tell_cells_apart():
    configs = [
        TrainConfig(lr=5e-4, peft=True, lora_layers=2),
        TrainConfig(epochs=3),
        TrainConfig(epochs=4),
        TrainConfig(mode="baseline"),
        TrainConfig(mode="baseline", limit=10),
    ]
    names = ["LoRA r16 a32 last 2 5e-4", "full 2e-5 epochs 3", "full 2e-5 epochs 4", "baseline", "baseline limit 10"]
    assert cell_names([asdict(config) for config in configs]) == names


BAD = [
    ("seeds = [1]\n[[cel]]\nlr = 1", "cel: expected one of cell, defaults, seeds"),
    ("seeds = [1]", "cell: expected at least one"),
    ("seeds = [1]\ncell = 3", "cell: expected at least one"),
    ("defaults = 3\nseeds = [1]\n[[cell]]", "defaults: expected a"),
    ("[[cell]]\nlr = 1e-3", "cell 1: seeds: expected a list"),
    ("seeds = 1\n[[cell]]", "cell 1: seeds: expected a list"),
    ("seeds = [1.5]\n[[cell]]", "cell 1: seeds: expected a whole number, found 1.5"),
    ("seeds = [1]\n[[cell]]\n[[cell]]\nrate = 3", "cell 2: rate: expected one of"),
    ("seeds = [1]\n[[cell]]\nlr = 'high'", "cell 1: lr: expected a number, found 'high'"),
    ("seeds = [1]\n[[cell]]\nlr = [1e-3, true]", "cell 1: lr: expected a number, found True"),
    ("seeds = [1]\n[[cell]]\nlr = 1" + "0" * 400, "cell 1: lr: expected a number, found 1000"),
    ("seeds = [1]\n[[cell]]\nlr = []", "cell 1: lr: expected a value or a list"),
    ("seeds = [1]\n[[cell]]\nlr = -1.0", "cell 1: --lr: expected a number above 0"),
    ("seeds = [1]\n[[cell]]\nepochs = 1.5", "cell 1: epochs: expected a whole number, found 1.5"),
    ("seeds = [1]\n[[cell]]\nplain = 'yes'", "cell 1: plain: expected true or false, found 'yes'"),
    ("seeds = [1]\n[[cell]]\nprecision = 'fp8'", "cell 1: precision: expected one of auto, fp32, bf16, found 'fp8'"),
    ("seeds = [1]\n[[cell]]\nmethod = 'adapter'", "cell 1: method: expected one of full, lora, baseline"),
    ("seeds = [1]\n[[cell]]\nmethod = [['full']]", "cell 1: method: expected one of full, lora, baseline"),
    ("seeds = [1]\n[[cell]]\nlora_layers = 1", "cell 1: --lora_layers goes with --peft"),
    ("seeds = [1]\n[[cell]]\nseed = 3", "cell 1: seed: expected one of"),
    ("seeds = [1\n", "expected a TOML file"),
]


@pytest.mark.parametrize(("text", "says"), BAD)
def test_a_wrong_file_is_one_line_that_names_file_cell_key_found_and_expected(cli, tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_grid(path, {})
    assert str(path) in str(error.value) and says in str(error.value)
    code, _, err = cli("--sweep", str(path), dataset=None)
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert not cli.runs.exists()


def test_grids_of_the_studies_are_valid():
    for path in sorted((ROOT / "experiments").glob("*.toml")):
        assert read_grid(path, {})


def finished(root) -> dict:
    return {path.parent.name: read_json(path)["test"] for path in root.glob("*/result.json")}


def test_a_sweep_runs_skips_resumes_and_tries_again(swept, tmp_path):
    grid, whole, said = swept
    words = ("--sweep", str(grid), "--output_dir", str(tmp_path / "runs"), "--device", "cpu")
    listed = command(*words, "--dry_run")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.count("| to do | unknown |") == 3 and not (tmp_path / "runs").exists()
    first = finished(whole)
    assert len(first) == 3 and "[3/3]" in said and "nothing left to train" in said
    devices = {read_json(path)["device"] for path in whole.glob("*/config.json")}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(device.endswith(f"({threads} threads, 2 runs at once)") for device in devices)

    root = shutil.copytree(whole, tmp_path / "runs" / "grid")
    killed, kept, broken = sorted(path.parent for path in root.glob("*/config.json"))
    (killed / "result.json").unlink()
    (broken / "result.json").unlink()
    changed = read_json(broken / "config.json") | {"model": {"fingerprint": "another"}}  # it cannot be resumed
    (broken / "config.json").write_text(json.dumps(changed))
    kept.rename(root / "renamed by its user")
    listed = command(*words, "--dry_run").stdout
    assert [listed.count(f"| {state} |") for state in ("done", "unfinished", "to do")] == [1, 2, 0]
    assert "unknown" not in listed
    again = command(*words)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    assert again.stderr.splitlines()[-1].startswith("error: 1 of 3 runs failed")
    assert "its model" in again.stderr
    (broken / "config.json").unlink()  # now nothing is left of it but a folder
    last = command(*words)
    assert last.returncode == 0 and "[1/1]" in last.stderr
    assert sorted(map(str, finished(root).values())) == sorted(map(str, first.values()))


def test_the_estimate_is_rows_by_the_newest_rate_of_the_same_kind(tmp_path):
    from sweep import Estimate, readable

    def record(name, when, method, dataset, rate, device="a machine", **more):
        config = {"model": None, "dataset": dataset, "limit": None, "lora_layers": None} | more
        content = {"method": method, "config": config, "samples_per_second": rate, "data": {"rows": {"train": 8000}}}
        content["device"] = device
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(content))
        os.utime(tmp_path / name / "result.json", (when, when))

    record("old", 1, "full", None, 50.0)
    record("new", 2, "full", "rotten_tomatoes", 100.0)
    record("other data", 3, "full", "sst2", 400.0, limit=10)
    record("last layer", 4, "lora", None, 900.0, lora_layers=1)
    (tmp_path / "another program").mkdir()
    (tmp_path / "another program" / "result.json").write_text("{}")
    seconds = Estimate(tmp_path, workers=1)
    assert seconds(TrainConfig(epochs=2)) == 2 * 8000 / 100
    assert seconds(TrainConfig(epochs=2, limit=500)) == 2 * 500 / 100
    assert seconds(TrainConfig(dataset="sst2")) is None  # a rate, but nothing tells the rows
    assert seconds(TrainConfig(dataset="sst2", limit=600)) == 3 * 600 / 400
    assert seconds(TrainConfig(peft=True)) is None
    assert seconds(TrainConfig(peft=True, lora_layers=1)) == 3 * 8000 / 900
    assert Estimate(tmp_path, workers=4)(TrainConfig(epochs=2)) == 2 * 8000 / 25  # four share what one had to itself
    record("four at once", 5, "full", None, 30.0, device="a GPU (4 runs at once)")
    assert Estimate(tmp_path, workers=4)(TrainConfig(epochs=2)) == pytest.approx(2 * 8000 / 30)
    assert Estimate(tmp_path, workers=1)(TrainConfig(epochs=2)) == pytest.approx(2 * 8000 / 120)
    assert [readable(s) for s in (4, 89, 600, 11100)] == ["4 s", "89 s", "10 min", "3 h 05 min"]


def test_flags_that_a_run_once_begun_does_not_take_are_noted(grid, tmp_path, monkeypatch, capsys):
    import sweep

    (first, *_) = read_grid(grid, {})
    (tmp_path / "runs" / "grid" / "begun").mkdir(parents=True)
    (tmp_path / "runs" / "grid" / "begun" / "config.json").write_text(json.dumps({"config": asdict(first)}))
    monkeypatch.setattr(sweep, "_run_all", lambda *_: [])
    words = ("--sweep", str(grid), "--output_dir", str(tmp_path / "runs"))
    for more, said in (((), False), (("--wandb", "--save_every", "5"), True)):
        sweep.sweep(parse_args([*words, *more]))
        note = "note: 1 runs that were begun keep their own --wandb --save_every"
        assert (note in capsys.readouterr().err) == said


def test_workers_run_at_the_same_time_and_hold_the_lock_when_the_sweep_is_gone(tmp_path):
    """Two jobs that wait for each other; and one that outlives its pool."""
    from sweep import _only_one

    waits = "import pathlib, sys, time; mine, other = map(pathlib.Path, sys.argv[1:]); mine.touch()\n"
    waits += "for _ in range(600): time.sleep(0.05) if not other.exists() else sys.exit(0)\nsys.exit(1)"
    with _only_one(tmp_path) as lock:
        pool = LocalPool(2, lock)
        one, two = str(tmp_path / "one"), str(tmp_path / "two")
        jobs = [pool.submit(["-c", waits, *files], tmp_path / "log") for files in ((one, two), (two, one))]
        assert [job.result() for job in jobs] == [0, 0]
        late = pool.submit(["-c", waits, str(tmp_path / "three"), str(tmp_path / "four")], tmp_path / "log")
        while not (tmp_path / "three").exists():
            time.sleep(0.05)
    with pytest.raises(UserError, match="another sweep is at work"), _only_one(tmp_path):
        pass
    (tmp_path / "four").touch()
    assert late.result() == 0
    with _only_one(tmp_path):
        pass


def stop_sweep(words: tuple[str, ...], number: int, going_on) -> tuple[int, str]:
    """(exit code, stderr) of a sweep that gets signal `number` once `going_on()`."""
    child = subprocess.Popen([sys.executable, str(ROOT / "main.py"), *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not going_on() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    _, err = child.communicate(timeout=150)
    return child.returncode, err


def test_a_signal_goes_to_the_runs_and_the_same_command_goes_on(grid, tmp_path):
    """Stopped by either signal, one after the other, and finished by the third command."""
    text = grid.read_text().replace("epochs = 1", "epochs = 200").replace("[1, 2]", "[1]")
    grid.write_text(text[: text.rindex("[[cell]]")])
    words = ("--sweep", str(grid), "--output_dir", str(tmp_path / "runs"), "--device", "cpu")
    root = tmp_path / "runs" / "grid"

    def logged() -> int:
        return sum(path.stat().st_size for path in root.glob("*/metrics.jsonl"))

    for resumed, (number, code) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143)]):
        before = logged()
        found, err = stop_sweep(words, number, lambda before=before: logged() > before)
        assert found == code, err
        assert "1 runs to go; the same command goes on" in err
        (config,) = root.glob("*/config.json")
        assert list(config.parent.glob("checkpoints/step-*/manifest.json"))
        log = next((root / "logs").iterdir())
        assert len(re.findall(r"resuming at step [1-9]", log.read_text())) == resumed
    assert command(*words).returncode == 0
    assert len(re.findall(r"resuming at step [1-9]", log.read_text())) == 2


def test_a_second_signal_is_not_passed_on(monkeypatch):
    """It would end the runs without their checkpoints. The first is, though nobody can read of it."""
    passed = []
    monkeypatch.setattr("pools.os.write", gone)
    with ForwardSignals(SimpleNamespace(stop=passed.append)) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert passed == [signal.SIGINT] and signals.number == signal.SIGINT


def test_two_sweeps_in_one_folder_are_refused(grid, tmp_path):
    from sweep import _only_one

    root = tmp_path / "runs" / "grid"
    root.mkdir(parents=True)
    with _only_one(root):
        done = command("--sweep", str(grid), "--output_dir", str(tmp_path / "runs"))
    assert done.returncode == 2 and "another sweep is at work" in done.stderr


def test_a_ray_cluster_of_two_workers_runs_a_sweep(swept, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    grid, locally, _ = swept
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        words = ("--sweep", str(grid), "--output_dir", str(tmp_path / "runs"), "--device", "cpu")
        done = command(*words, "--ray", cluster.address, timeout=200)
        assert done.returncode == 0, done.stderr
    finally:
        cluster.shutdown()
    root = tmp_path / "runs" / "grid"
    assert len(list(root.glob("*/result.json"))) == 3
    assert finished(root) == finished(locally)  # the same runs, wherever they ran
    assert not any("runs at once" in read_json(path)["device"] for path in root.glob("*/config.json"))  # a CPU each


def test_without_ray_it_says_how_to_install_it(grid, tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('no ray')")
    done = command("--sweep", str(grid), "--ray", "--output_dir", str(tmp_path / "runs"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "requirements-ray.txt" in done.stderr.splitlines()[-1]


def test_a_flag_that_no_run_reads_is_refused_and_one_that_some_read_is_none_of_the_others(tmp_path):
    full, lora = '[[cell]]\nmethod = "full"\n', '[[cell]]\nmethod = "lora"\n'
    mixed = '[[cell]]\nmethod = ["full", "lora"]\nlora_r = [4, 8]\n'
    for text, given, says in (
        (f"{full}lora_r = 8", {}, "cell 1: --lora_r goes with --peft"),
        (f'{full}[[cell]]\nmethod = "baseline"\nlr = 1e-3', {}, "cell 2: --lr goes with --finetune"),
        (f"[defaults]\nlora_r = 8\n{full}", {}, "defaults: --lora_r goes with --peft"),
        (full, {"lora_r": 8}, "--lora_r goes with --peft"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            read_grid(written(tmp_path, f"seeds = [1]\n{text}"), given)
    runs = read_grid(written(tmp_path, f"seeds = [1]\n[defaults]\nlora_alpha = 64\n{mixed}{lora}"), {"epochs": 2})
    assert [(run.method, run.lora_r) for run in runs] == [("full", 4), ("lora", 4), ("lora", 8), ("lora", 16)]
    for run in runs:  # the words of a run hold what it reads, and make the same run
        assert identity(asdict(parse_args(command_words(run)))) == identity(asdict(run))
