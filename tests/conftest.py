"""A tiny model, tiny data, and the real command line, in this process or in one of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Read when the libraries are imported, so: before they are. Nothing of the user's is read or written.
_HOME = tempfile.TemporaryDirectory(prefix="distilbert-sentiment-tests-")
os.environ |= {
    "HF_HOME": f"{_HOME.name}/hf",
    "HF_HUB_OFFLINE": "1",
    "DISTILBERT_SENTIMENT_CACHE": f"{_HOME.name}/cache",
    "OMP_NUM_THREADS": "1",  # the tests' models are too small for more, and waiting threads take the core
    "COMET_CONFIG": f"{_HOME.name}/comet.config",
}
for _secret in ("WANDB_API_KEY", "COMET_API_KEY"):
    os.environ.pop(_secret, None)

import standin_hub

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random DistilBERT: 2 layers, 16 wide."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    standin_hub.write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Folders of parquet splits named as the four data sets, learnable from single words."""
    root = tmp_path_factory.mktemp("data")
    for name in ("rotten_tomatoes", "sst2", "ag_news"):
        standin_hub.write_tiny_dataset(root / name, name, 96)
    return root


@pytest.fixture
def cli(tiny_model, tiny_data, tmp_path, capsys):
    """cli("--finetune", ...) runs main on the tiny model and data and returns (exit code, stdout, stderr)."""
    from main import main

    def run(*words: str, dataset: str | None = "rotten_tomatoes") -> tuple[int, str, str]:
        where = ["--output_dir", str(tmp_path / "runs"), "--plots_dir", str(tmp_path / "plots")]  # words may override
        where += ["--dataset", str(tiny_data / dataset), "--model", str(tiny_model)] if dataset else []
        capsys.readouterr()
        try:
            code = main([*where, *words])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    run.runs = tmp_path / "runs"
    return run


def command(*words: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
    """`python main.py ...` in a process of its own, without a terminal, with `env` on top of the tests' own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *words],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
