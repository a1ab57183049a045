"""Two CPU processes: the run of one process, one folder, one log."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, command, read_json, read_lines

WORDS = ("--finetune", "--epochs", "2", "--batch_size", "8", "--precision", "fp32", "--lr", "1e-3", "--limit", "93")


def launch(*words: str) -> subprocess.CompletedProcess:
    """With torchrun: `accelerate launch --num_processes 2 --cpu` starts one process alone (accelerate 1.15)."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launcher, str(ROOT / "main.py"), *words, "--device", "cpu"],
        env={**os.environ},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.mark.parametrize("method", [(), ("--peft", "--lora_r", "4")])
def test_two_processes_make_the_run_of_one(tiny_model, tiny_data, tmp_path, method):
    """93 rows in batches of 8: the last batch, of 5, cannot be shared evenly. Dropout is on."""
    where = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"))
    one = command(*WORDS, *method, *where, "--output_dir", str(tmp_path / "one"))
    two = launch(*WORDS, *method, *where, "--output_dir", str(tmp_path / "two"))
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
