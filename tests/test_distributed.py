"""Two CPU processes: the run of one process, one folder, one log."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, command, read_json, read_lines

WORDS = ("--finetune", "--epochs", "2", "--batch_size", "8", "--precision", "fp32", "--lr", "1e-3", "--limit", "93")


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# `--cpu --num_processes 2` starts one process alone (accelerate 1.15); --multi_gpu is what starts several.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
FSDP = ("accelerate.commands.launch", "--use_fsdp", "--num_processes", "2")


def launch(*words: str, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", *launcher]
    return subprocess.run(
        [*launcher, str(ROOT / "main.py"), *words, "--device", "cpu"],
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


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
    lines = [read_lines(run / "metrics.jsonl") for run in (alone, shared)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for mine, theirs in zip(*lines):
        for key in ("train/loss", "val/loss", "test/loss"):
            if key in mine:
                assert theirs[key] == pytest.approx(mine[key], abs=1e-4), (mine["step"], key)
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


def test_fsdp_is_declined(tiny_model, tiny_data, tmp_path):
    where = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"))
    done = launch(*WORDS, *where, "--output_dir", str(tmp_path / "runs"), launcher=FSDP)
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    assert "error: accelerate launch: FSDP is not supported" in done.stderr
    assert "main.py" not in done.stderr.split("error: ")[0]  # no traceback of ours before it
