"""A tiny model, tiny data, and the real command line, in this process or in one of its own."""

import json
import os
import shutil
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

pytest.register_assert_rewrite("standin_trackers")
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
        where = ["--output_dir", str(tmp_path / "runs")] * ("--sync" not in words)  # words may override
        where += ["--plots_dir", str(tmp_path / "plots")] * ("--report" in words)
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


@pytest.fixture(params=["compiled", "torch"])
def both_arithmetics(request, monkeypatch):
    """What asks for this holds for the compiled kernels and for PyTorch's operations in their place."""
    import kernels

    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif shutil.which("g++") is None:
        pytest.skip("no compiler")
    else:
        assert kernels.library() is not None


@pytest.fixture(scope="module")
def clean_machine(tmp_path_factory):
    """No settings of the user's, and an empty home, working and temporary folder, which must stay empty."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as env:
        for name in list(os.environ):
            if name.startswith(("WANDB_", "COMET_")) or name.lower().endswith("_proxy"):
                env.delenv(name)
        for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "TMPDIR"):
            env.setenv(name, str(home))
        env.chdir(home)
        yield
    # but for matplotlib's font cache and the port number of a wandb that was killed as it started
    left = [path for path in home.rglob("*") if path.is_file() and path.parent.name != "matplotlib"]
    assert [path for path in left if not path.name.startswith("port-")] == []


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
