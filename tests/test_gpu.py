"""Runs on a GPU, where there is one; conftest.py hides it from all other tests."""

import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, command, read_json
from test_resume import outcome
from test_train import LEARNS

pytestmark = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no GPU")
VISIBLE = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}


def test_kernels_and_graphs():
    script = [sys.executable, str(ROOT / "tests" / "on_gpu.py")]
    done = subprocess.run(script, env=VISIBLE, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout == "all is well\n", done.stderr


@pytest.mark.parametrize("words", ["", "--peft", "--peft --lora_layers 1", "--plain", "--peft --precision fp32"])
def test_it_learns_on_a_gpu(tiny_model, tiny_data, tmp_path, words):
    where = ("--dataset", str(tiny_data / "rotten_tomatoes"), "--model", str(tiny_model), "--output_dir", str(tmp_path))
    done = command("--finetune", *LEARNS, "--device", "cuda", *words.split(), *where, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.iterdir()
    assert read_json(run / "result.json")["test"]["accuracy"] > 0.6  # chance: 0.5; one LoRA layer on a CPU: 0.71
    done = command("--predict", str(run), "great moving story", "--device", "cuda", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0 and '"label"' in done.stdout, done.stderr


@pytest.mark.parametrize("words", ["", "--peft"])
def test_killed_and_resumed_it_is_the_same_run(tiny_model, tiny_data, tmp_path, words):
    where = ("--dataset", str(tiny_data / "rotten_tomatoes"), "--model", str(tiny_model))
    words = ("--finetune", "--epochs", "100", "--batch_size", "8", "--save_every", "5", *words.split(), *where)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*words, "--output_dir", str(whole), CUDA_VISIBLE_DEVICES="0").returncode == 0
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *words, "--output_dir", str(killed)],
        env=VISIBLE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while child.poll() is None and not list(killed.glob("*/checkpoints/step-*/manifest.json")):
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -9, "it ended too soon"
    (run,) = killed.iterdir()
    assert command("--resume", str(run), CUDA_VISIBLE_DEVICES="0").returncode == 0
    assert outcome(run) == outcome(next(whole.iterdir()))
