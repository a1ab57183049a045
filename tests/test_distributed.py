"""Two CPU processes: the run of one process, one folder, one log."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, read_json, read_lines
from safetensors.torch import load_file
from test_resume import outcome, run_killed_at

from engine import PlainEngine

WORDS = ("--finetune", "--epochs", "2", "--batch_size", "8", "--precision", "fp32", "--lr", "1e-3", "--limit", "93")
WORDS += ("--max_grad_norm", "0.2")  # some steps are above it: then a mean for a sum of gradients shows, despite AdamW


def launcher(words: str) -> list[str]:
    """The README's line that starts with these words, up to main.py; so its lines run here, not in test_readme.py."""
    line = re.search(rf"^({re.escape(words)}.*) main\.py", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    program, *rest = line[1].split()
    return [str(Path(sys.executable).with_name(program)), *rest]


TORCHRUN = launcher("torchrun --standalone")
# `--cpu --num_processes 2` starts one process alone (accelerate 1.15); --multi_gpu is what starts several.
ACCELERATE = launcher("accelerate launch --multi_gpu")
FSDP = launcher("accelerate launch --use_fsdp")


def launch(*words: str, by: list[str] = TORCHRUN, script: Path = ROOT / "main.py") -> subprocess.CompletedProcess:
    return subprocess.run(
        [*by, str(script), *words, "--device", "cpu"],
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.fixture
def two(tiny_model, tiny_data, tmp_path):
    """two(*words, by=...) makes a run with two processes and returns its folder."""

    def make(*words: str, **how) -> Path:
        where = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"))
        done = launch(*WORDS, *where, "--output_dir", str(tmp_path / "two"), *words, **how)
        assert done.returncode == 0, done.stderr
        (run,) = (tmp_path / "two").iterdir()
        return run

    return make


@pytest.fixture(scope="module")
def whole(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """What two processes make that nothing stops: held to the run of one, and to one that was killed."""
    folder = tmp_path_factory.mktemp("whole")
    where = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"), "--output_dir", str(folder))
    done = launch(*WORDS, *where, by=ACCELERATE)
    assert done.returncode == 0, done.stderr
    (run,) = folder.iterdir()
    return run


def assert_same_losses(alone: Path, shared: Path) -> None:
    lines = [read_lines(run / "metrics.jsonl") for run in (alone, shared)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for mine, theirs in zip(*lines):
        for key in ("train/loss", "val/loss", "test/loss"):
            if key in mine:
                assert theirs[key] == pytest.approx(mine[key], abs=1e-4), (mine["step"], key)


def assert_same_run(alone: Path, shared: Path) -> None:
    assert read_json(shared / "config.json")["processes"] == 2
    assert_same_losses(alone, shared)
    rows = [read_lines(run / "predictions.jsonl") for run in (alone, shared)]
    assert [row["text"] for row in rows[0]] == [row["text"] for row in rows[1]]  # every row, once, in order
    np.testing.assert_allclose(
        [row["probability"] for row in rows[0]], [row["probability"] for row in rows[1]], atol=1e-3
    )


def alone(cli, *words: str) -> Path:
    """The folder of the run that this process makes."""
    code, _, err = cli(*WORDS, *words)
    assert code == 0, err
    (run,) = cli.runs.iterdir()
    return run


def test_two_processes_make_the_run_of_one(cli, whole):
    """93 rows in batches of 8: the last batch, of 5, cannot be shared evenly. Dropout is on."""
    assert_same_run(alone(cli), whole)


def test_two_processes_make_the_lora_run_of_one(cli, two):
    lora = ("--peft", "--lora_r", "4")
    assert_same_run(alone(cli, *lora), two(*lora))


def test_another_number_of_processes_cannot_go_on_with_a_run(cli, monkeypatch):
    """Begun by one process and stopped; two are refused, by one line of each, and the run stays as it is."""
    run = run_killed_at(4, cli, monkeypatch, *WORDS, "--save_every", "3", "--device", "cpu")
    assert list(run.glob("checkpoints/step-*"))
    before = (run / "metrics.jsonl").read_bytes()
    refused = launch("--resume", str(run))
    assert refused.returncode != 0
    assert f"error: --resume {run}: its processes was 1, now it is 2" in refused.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def still(tiny_model, tmp_path) -> Path:
    """The tiny model without dropout: the plain engine's depends on the number of processes."""
    folder = tmp_path / "still"
    shutil.copytree(tiny_model, folder)
    off = dict.fromkeys(("dropout", "attention_dropout", "seq_classif_dropout"), 0.0)
    (folder / "config.json").write_text(json.dumps(read_json(folder / "config.json") | off))
    return folder


@pytest.mark.parametrize("method", [(), ("--peft", "--lora_r", "4", "--lora_dropout", "0")])
def test_fsdp_makes_the_run_of_one_process(still, cli, two, method):
    one = alone(cli, *method, "--model", str(still), "--plain")
    shared = two(*method, "--model", str(still), by=FSDP)
    assert read_json(shared / "config.json")["engine"] == "plain (FSDP)"
    assert_same_losses(one, shared)
    for name in ("model.safetensors", *(["adapter_model.safetensors"] if method else [])):
        mine, theirs = (load_file(run / "model" / name) for run in (one, shared))
        assert mine.keys() == theirs.keys()
        for key, weight in mine.items():
            torch.testing.assert_close(theirs[key], weight, atol=1e-4, rtol=0)


def behind_checkpoint_15(folder: Path, act: str) -> Path:
    """main.py, but that `act` happens once the checkpoint of step 15 is written: it lies between two log lines."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport checkpoint, os, shutil, signal, main\n"
    code += "save = checkpoint.save\ndef acting(root, step, state):\n save(root, step, state)\n"
    code += f" if step == 15: {act}\ncheckpoint.save = acting\nmain.main()"
    (folder / "acting.py").write_text(code)
    return folder / "acting.py"


def assert_goes_on(run: Path, whole: Path, by: list[str]) -> None:
    assert (run / "checkpoints" / "step-15").exists() and not (run / "result.json").exists()
    resumed = launch("--resume", str(run), by=by)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 15" in resumed.stderr
    assert outcome(run) == outcome(whole)


def test_two_processes_go_on_where_they_were_killed(tiny_model, tiny_data, tmp_path, whole):
    where = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"), "--save_every", "5")
    script = behind_checkpoint_15(tmp_path, "os.kill(0, signal.SIGKILL)")
    killed = launch(*WORDS, *where, "--output_dir", str(tmp_path / "killed"), script=script)
    assert killed.returncode != 0
    (run,) = (tmp_path / "killed").iterdir()
    assert_goes_on(run, whole, TORCHRUN)


def test_fsdp_goes_on_from_what_a_kill_would_leave(two, tmp_path):
    """A copy of the folder in that moment is what SIGKILL leaves, and the run itself goes on to compare with."""
    left = tmp_path / "left"
    script = behind_checkpoint_15(tmp_path, f"shutil.copytree(root.parent, {str(left)!r})")
    assert_goes_on(left, two("--save_every", "5", by=FSDP, script=script), FSDP)


@pytest.mark.parametrize(
    ("variable", "value"), [("FSDP_SHARDING_STRATEGY", "NO_SHARD"), ("ACCELERATE_USE_DEEPSPEED", "true")]
)
def test_another_way_to_spread_a_model_is_declined(cli, monkeypatch, variable, value):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(variable, value)
    code, _, err = cli("--finetune")
    assert code == 2 and not cli.runs.exists()
    (line,) = err.strip().splitlines()
    assert line.startswith("error: accelerate launch: ")


def test_processes_on_the_plain_engine_drop_other_elements():
    model, drawn = torch.nn.Linear(2, 2), []
    with torch.random.fork_rng(devices=[]):
        for process in (0, 1, 1):
            torch.manual_seed(5)
            PlainEngine(model, SimpleNamespace(num_processes=2, process_index=process), "", "fp32", 1e-3, 0.0, None, 0)
            drawn.append(torch.rand(()).item())
    assert drawn[0] != drawn[1] == drawn[2]
