"""Two CPU processes: the run of one process, one folder, one log."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, read_json, read_lines
from safetensors.torch import load_file
from test_resume import outcome

WORDS = ("--finetune", "--epochs", "2", "--batch_size", "8", "--precision", "fp32", "--lr", "1e-3", "--limit", "93")


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# `--cpu --num_processes 2` starts one process alone (accelerate 1.15); --multi_gpu is what starts several.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
FSDP = ("accelerate.commands.launch", "--use_fsdp", "--num_processes", "2")


def launch(
    *words: str, launcher: tuple[str, ...] = TORCHRUN, script: Path = ROOT / "main.py"
) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", *launcher]
    return subprocess.run(
        [*launcher, str(script), *words, "--device", "cpu"],
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def assert_same_losses(alone: Path, shared: Path) -> None:
    lines = [read_lines(run / "metrics.jsonl") for run in (alone, shared)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for mine, theirs in zip(*lines):
        for key in ("train/loss", "val/loss", "test/loss"):
            if key in mine:
                assert theirs[key] == pytest.approx(mine[key], abs=1e-4), (mine["step"], key)


@pytest.mark.parametrize(("method", "launcher"), [((), ACCELERATE), (("--peft", "--lora_r", "4"), TORCHRUN)])
def test_two_processes_make_the_run_of_one(tiny_model, tiny_data, tmp_path, method, launcher):
    """93 rows in batches of 8: the last batch, of 5, cannot be shared evenly. Dropout is on."""
    where = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"))
    one = command(*WORDS, *method, *where, "--output_dir", str(tmp_path / "one"))
    two = launch(*WORDS, *method, *where, "--output_dir", str(tmp_path / "two"), launcher=launcher)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    (alone,), (shared,) = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert read_json(shared / "config.json")["processes"] == 2
    assert_same_losses(alone, shared)
    rows = [read_lines(run / "predictions.jsonl") for run in (alone, shared)]
    assert [row["text"] for row in rows[0]] == [row["text"] for row in rows[1]]  # every row, once, in order
    np.testing.assert_allclose(
        [row["probability"] for row in rows[0]], [row["probability"] for row in rows[1]], atol=1e-3
    )


def test_another_number_of_processes_cannot_go_on_with_a_run(tiny_model, tiny_data, tmp_path):
    """Begun by one process and stopped; two are refused, by one line of each, and the run stays as it is."""
    where = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"), "--output_dir", str(tmp_path))
    words = [sys.executable, str(ROOT / "main.py"), *WORDS, "--epochs", "2000", "--save_every", "3", *where]
    process = subprocess.Popen([*words, "--device", "cpu"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.communicate(timeout=60) and process.returncode == 143
    (run,) = tmp_path.iterdir()
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
def test_fsdp_makes_the_run_of_one_process(still, tiny_data, tmp_path, method):
    where = (*method, "--model", str(still), "--dataset", str(tiny_data / "rotten_tomatoes"))
    one = command(*WORDS, *where, "--plain", "--output_dir", str(tmp_path / "one"))
    two = launch(*WORDS, *where, "--output_dir", str(tmp_path / "two"), launcher=FSDP)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    (alone,), (shared,) = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert read_json(shared / "config.json")["engine"] == "plain (FSDP)"
    assert_same_losses(alone, shared)
    for name in ("model.safetensors", *(["adapter_model.safetensors"] if method else [])):
        mine, theirs = (load_file(run / "model" / name) for run in (alone, shared))
        assert mine.keys() == theirs.keys()
        for key, weight in mine.items():
            torch.testing.assert_close(theirs[key], weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("launcher", [TORCHRUN, FSDP])
def test_two_processes_go_on_where_they_were_killed(tiny_model, tiny_data, tmp_path, launcher):
    """Dropout is on, and the checkpoint lies between two log lines."""
    where = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"), "--save_every", "5")
    whole = launch(*WORDS, *where, "--output_dir", str(tmp_path / "whole"), launcher=launcher)
    assert whole.returncode == 0, whole.stderr
    code = "import checkpoint, os, signal, main\nsave = checkpoint.save\n"
    code += "def killing(root, step, state):\n save(root, step, state)\n if step == 15: os.kill(0, signal.SIGKILL)\n"
    code += "checkpoint.save = killing\nmain.main()"
    (tmp_path / "killed.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    killed = launch(
        *WORDS, *where, "--output_dir", str(tmp_path / "killed"), launcher=launcher, script=tmp_path / "killed.py"
    )
    assert killed.returncode != 0
    (run,) = (tmp_path / "killed").iterdir()
    assert (run / "checkpoints" / "step-15").exists() and not (run / "result.json").exists()
    resumed = launch("--resume", str(run), launcher=launcher)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 15" in resumed.stderr
    (alone,) = (tmp_path / "whole").iterdir()
    assert outcome(run) == outcome(alone)


@pytest.mark.parametrize(
    ("variable", "value"), [("FSDP_SHARDING_STRATEGY", "NO_SHARD"), ("ACCELERATE_USE_DEEPSPEED", "true")]
)
def test_another_way_to_spread_a_model_is_declined(tiny_model, tiny_data, tmp_path, variable, value):
    where = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"), "--device", "cpu")
    env = {"ACCELERATE_USE_FSDP": "true", variable: value}
    done = command(*WORDS, *where, "--output_dir", str(tmp_path / "runs"), **env)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: accelerate launch: ")


def test_processes_on_the_plain_engine_drop_other_elements():
    code = """
import torch
from types import SimpleNamespace
from engine import PlainEngine
model = torch.nn.Linear(2, 2)
for process in (0, 1, 1):
    torch.manual_seed(5)
    PlainEngine(model, SimpleNamespace(num_processes=2, process_index=process), "", "fp32", 1e-3, 0.0, None, 0)
    print(torch.rand(()).item())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    main, other, again = done.stdout.split()
    assert main != other and other == again
