"""Labels a second: `--predict` beside transformers.pipeline(batch_size=32), on one run's model, in one process.

    python bench/predict.py RUN [--rows 4000] [--rounds 3]

The texts are the run's own test rows, over and over with a number behind each, so that no two are alike. The two take
turns; the median round counts. Both start from strings and end with labels and probabilities. Says, too, how far bf16
moves the difference of the two best logits, which `predict.CLOSE` must exceed for the labels to be those of fp32.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as main.py does

import numpy as np
import torch
from transformers import pipeline

import predict
from records import read_lines
from streams import WINDOW_ROWS


def texts_of(run: Path, rows: int) -> list[str]:
    own = [line["text"] for line in read_lines(run / "predictions.jsonl")]
    return [f"{own[number % len(own)]} {number}" for number in range(rows)]


def ours(predictor: predict.Predictor, texts: list[str]) -> np.ndarray:
    """[n, classes], window by window as --predict does."""
    starts = range(0, len(texts), WINDOW_ROWS)
    return np.concatenate([predictor(texts[start : start + WINDOW_ROWS]) for start in starts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    texts = texts_of(args.run, args.rows)
    predictor = predict.Predictor(predict.open_saved(str(args.run), "predict"), "auto", "auto")
    classify = pipeline("text-classification", model=str(args.run / "model"), device=predictor.device)
    names = predictor.saved.label_names
    predictor(texts[:64]), classify(texts[:64], batch_size=32, truncation=True)
    rates: dict[str, list[float]] = {"pipeline": [], "predict": []}
    for _ in range(args.rounds):
        started = time.perf_counter()
        theirs = [row["label"] for row in classify(texts, batch_size=32, truncation=True)]
        rates["pipeline"].append(len(texts) / (time.perf_counter() - started))
        started = time.perf_counter()
        probabilities = ours(predictor, texts)
        rates["predict"].append(len(texts) / (time.perf_counter() - started))
    same = sum(names[row.argmax()] == label for row, label in zip(probabilities, theirs, strict=True))
    for name, found in rates.items():
        print(f"{name:9} {statistics.median(found):8.0f} texts/s   rounds: {' '.join(f'{rate:.0f}' for rate in found)}")
    print(f"ratio     {statistics.median(rates['predict']) / statistics.median(rates['pipeline']):8.2f}")
    print(f"labels    {same} of {len(texts)} the same ({predictor.precision}, torch {torch.__version__})")
    if predictor.precision == "bf16":
        limit, predict.CLOSE = predict.CLOSE, 0.0  # bf16 alone
        rounded = np.log(ours(predictor, texts))
        predictor.forward = predictor.exact
        exact = np.log(ours(predictor, texts))
        two = np.argsort(exact, axis=1)[:, -2:]  # the best two
        gaps, exact_gaps = (np.diff(np.take_along_axis(some, two, axis=1)) for some in (rounded, exact))
        moved, share = np.abs(gaps - exact_gaps).max(), np.mean(exact_gaps < limit)
        print(f"bf16 moves a difference of logits by at most {moved:.4f}; below {limit}: {share:.1%} of the rows")


if __name__ == "__main__":
    main()
