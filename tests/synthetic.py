"""Records of runs that nobody ran, with the shape of the studies' and a known answer. `python tests/synthetic.py DIR`
writes them, to look at a report without a day of training."""

import hashlib
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from config import TrainConfig
from grid import read_grid
from metrics import score_with_intervals
from records import Rows, Run, export, identity

ROOT = Path(__file__).parent.parent
TESTS = {"rotten_tomatoes": 1066, "sst2": 872}


def rows_of(data: str) -> Rows:
    rng, n = np.random.default_rng(len(data)), TESTS[data]
    fingerprint = hashlib.sha256(data.encode()).hexdigest()
    return Rows(fingerprint, rng.integers(0, 2, n), rng.integers(3, 50, n), rng.random(n) < 0.3, None)


def skill(config: TrainConfig) -> float:
    """How good a run is, on a probit scale: what the report should find out."""
    if config.mode == "baseline":
        return 0.7
    best = 5e-4 if config.peft else 5e-5
    gain = 1.25 - 0.12 * abs(np.log10(config.lr / best)) - (0.15 if config.limit else 0.0)
    return gain - 0.1 * (3 - min(config.lora_layers or 3, 3)) + (0.25 if config.dataset == "sst2" else 0)


def make_run(config: TrainConfig, skill: float, rows: Rows) -> Run:
    """One run: a row is right where its easiness, the same for all runs, and the run's skill and luck outweigh 0."""
    n, key = len(rows.labels), repr(identity(asdict(config))).encode()
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:4]))
    easy = np.random.default_rng(n).normal(0, 1, n)
    margin = easy + skill + 0.03 * rng.standard_normal() + 0.4 * rng.standard_normal(n)
    predicted = np.where(margin > 0, rows.labels, 1 - rows.labels)
    confidence = np.round(0.5 + 0.5 * np.tanh(np.abs(margin)), 4)
    probabilities = np.where(np.arange(2) == predicted[:, None], confidence[:, None], 1 - confidence[:, None])
    scores = score_with_intervals(rows.labels, probabilities)
    epochs = [0] if config.mode == "baseline" else list(range(1, config.epochs + 1))
    growth = [1.0] if epochs == [0] else [1 - 0.3 / epoch for epoch in epochs]
    curve = {"epoch": epochs} | {f"val/{m}": [scores[m] * g for g in growth] for m in ("accuracy", "precision")}
    curve |= {"val/loss": [0.2 / g**2 for g in growth], "val/recall": growth, "val/f1": growth}
    trained = 770 if epochs == [0] else 400_000 * config.lora_r // 8 if config.peft else 22_713_218
    seconds = 5.0 if epochs == [0] else 40.0 * len(epochs) * (config.lora_layers or 6) / 6
    data = {"name": config.dataset, "kind": "local", "labels": ["negative", "positive"]}
    data |= {"rows": {"train": 8530, "validation": n, "test": n}}
    data["fingerprints"] = {"train": "a" * 64, "validation": "b" * 64, "test": rows.fingerprint}
    facts = {"best_epoch": epochs[-1] or None, "trainable_parameters": trained, "total_parameters": 22_713_218}
    facts |= {"train_seconds": seconds + rng.random(), "samples_per_second": 8530 * len(epochs) / seconds}
    facts |= {"memory_before_training_bytes": 8e8, "peak_memory_bytes": 9e8 + 40 * trained, "git_commit": None}
    facts |= {"precision": "bf16", "device": "no machine at all"}
    model = {"name": "an encoder nobody trained", "kind": "local", "fingerprint": "f" * 64}
    stored = {k: v for k, v in identity(asdict(config)) if k not in ("dataset", "dataset_dir", "model")}
    name = f"{config.method}-{config.seed}"
    return Run(name, stored, config.method, model, data, facts, scores, scores, curve, predicted, confidence, rows)


def study_runs() -> list[Run]:
    """A run for each cell and seed of the three studies' grids, once."""
    configs = {identity(asdict(c)): c for name in ("rotten_tomatoes", "sst2", "efficiency") for c in grid(name)}
    rows = {data: rows_of(data) for data in TESTS}
    return [make_run(config, skill(config), rows[config.dataset]) for config in configs.values()]


def grid(name: str) -> list[TrainConfig]:
    return read_grid(ROOT / "experiments" / f"{name}.toml", {})


if __name__ == "__main__":
    print(len(export(study_runs(), Path(sys.argv[1]))))
