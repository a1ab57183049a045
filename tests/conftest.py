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
    "CUDA_VISIBLE_DEVICES": "",  # the tests compare runs bit for bit, which is a promise of the CPU
    "OMP_NUM_THREADS": "1",  # the tests' models are too small for more, and waiting threads take the core
}
for _setting in ("WANDB_API_KEY", "COMET_API_KEY", "COMET_CONFIG", "COMET_INI"):
    os.environ.pop(_setting, None)
if any(Path(file).expanduser().is_file() for file in ("~/.comet.config", ".comet.config", ".env")):
    # Hidden by another file; not where there is none: what may hold a key costs each run a process that imports Comet.
    os.environ["COMET_CONFIG"] = f"{_HOME.name}/comet.config"

pytest.register_assert_rewrite("standin_trackers")
import standin_hub

ROOT = Path(__file__).parent.parent


LONGEST = (
    "distributed sweep tracker_faults cli resume signals readme predict encoders stats tracking metrics report".split()
)


def pytest_collection_modifyitems(items) -> None:
    """The long files first: one that began last would leave the other worker idle."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random DistilBERT: 2 layers, 16 wide."""
    import kernels

    kernels.library()  # compiled here, once, and not by each of the processes that a test starts at the same time
    folder = tmp_path_factory.mktemp("model") / "tiny"
    standin_hub.write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def nudged_model(tiny_model, tmp_path_factory) -> Path:
    """The tiny model, but for the weights of its first layer: all that it computes is different."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("nudged") / tiny_model.name)
    weights = load_file(folder / "model.safetensors")
    weights["distilbert.transformer.layer.0.ffn.lin1.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
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


@pytest.fixture
def no_curves(monkeypatch):
    """A run draws no curves.png, which takes a third of a tiny one's time. test_train.py looks for it."""
    import plots

    monkeypatch.setattr(plots, "draw_curves", lambda *_: None)


@pytest.fixture
def way_of_a_gpu(monkeypatch):
    """The CPU goes the way of a GPU, but for the captures, the attention and Triton's kernel, which no CPU has."""
    import fast
    from layers import Attention, DeviceLayer

    monkeypatch.setattr(fast.FastClassifier, "GRAPHED", ("cpu",))
    monkeypatch.setattr(DeviceLayer, "attention", Attention)


@pytest.fixture(params=["compiled", "torch", "graphs"])
def both_arithmetics(request, monkeypatch):
    """What asks for this holds for the compiled kernels, for PyTorch's operations in their place, and for the way of a
    GPU."""
    import kernels

    if request.param == "graphs":
        request.getfixturevalue("way_of_a_gpu")
    elif request.param == "torch":
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
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
