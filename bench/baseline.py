"""Seconds of a whole run: `--baseline`, with its cache empty and filled, beside the loop that most would write.

    python bench/baseline.py [--dataset DATA] [--rounds 3]

The peer: transformers' own encoder in fp32, batches of 16 in the order of the rows, padded to their longest text, CLS
embeddings of the three splits, then scikit-learn's LinearSVC as it comes. Each contestant is a process of its own,
timed from its start to its end; they take turns, and the median counts.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"


def peer(dataset: str | None) -> None:
    """The loop. Data and model are found by our own code, which takes no longer than the hub's cache would."""
    import numpy as np
    import torch
    from sklearn.metrics import accuracy_score
    from sklearn.svm import LinearSVC

    import models
    import runs
    from config import TrainConfig

    job = runs.prepare(config := TrainConfig(dataset=dataset), models.find_model(config.model))
    encoder = job.model.base_model.eval()
    features = {}
    for name, rows in job.data.splits.items():
        found = []
        for start in range(0, len(rows["text"]), 16):
            batch = job.tokenizer(rows["text"][start : start + 16], padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                found.append(encoder(**batch).last_hidden_state[:, 0].numpy())
        features[name] = np.concatenate(found)
    labels = {name: split.labels for name, split in job.splits.items()}
    classifier = LinearSVC().fit(features["train"], labels["train"])
    print("peer, test accuracy", accuracy_score(labels["test"], classifier.predict(features["test"])), file=sys.stderr)


def seconds(command: list[str], cache: Path) -> float:
    started = time.perf_counter()
    environment = {**os.environ, "DISTILBERT_SENTIMENT_CACHE": str(cache)}
    subprocess.run([sys.executable, *command], check=True, env=environment, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="be the peer, once")
    args = parser.parse_args()
    if args.peer:
        return peer(args.dataset)
    data = ["--dataset", args.dataset] if args.dataset else []
    taken: dict[str, list[float]] = {
        "the peer's loop": [],
        "--baseline, cache empty": [],
        "--baseline, cache filled": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        ours = [str(ROOT / "main.py"), "--baseline", "--output_dir", str(Path(folder, "runs")), *data]
        seconds(ours, cache)  # unpacks the encoder and compiles the kernels, once for all
        for _ in range(args.rounds):
            times = [seconds([__file__, "--peer", *data], cache)]
            for name in ("embeddings", "tokens"):
                shutil.rmtree(cache / name)
            times += [seconds(ours, cache), seconds(ours, cache)]
            for name, value in zip(taken, times):
                taken[name].append(value)
            print(
                "  ".join(f"{name}: {values[-1]:.1f} s" for name, values in taken.items()), file=sys.stderr, flush=True
            )
    medians = {name: statistics.median(values) for name, values in taken.items()}
    first = next(iter(medians.values()))
    print(f"\n| whole run, medians of {args.rounds} | seconds | x |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.1f} | {first / value:.1f} |")


if __name__ == "__main__":
    main()
