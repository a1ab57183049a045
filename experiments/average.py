"""Full runs of one data set averaged: the mean of their probabilities, and the mean of their weights.

    python experiments/average.py [--dataset_dir DIR] RUN RUN ...

One Markdown row each, by what the runs' own records say and by those two means. Choose by validation.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import UserError


def rows_of(runs: list[Path], dataset_dir: str | None) -> list[str]:
    """A header and a row for each run and each mean. UserError where a run is no full fine-tuning, or was on other rows
    than the others or than are there now."""
    import hub

    hub.go_offline_if_unreachable()
    from data import load_data
    from metrics import classification_metrics
    from predict import Predictor, open_saved
    from readers import Columns

    saved = [open_saved(str(run), "predict") for run in runs]
    config = saved[0].record["config"]
    columns = Columns(config["text_column"], config["label_column"])
    places = config["dataset"], dataset_dir or config["dataset_dir"]
    data = load_data(*places, config["limit"], config["seed"], columns)
    for run, one in zip(runs, saved):
        if one.record["method"] != "full":
            raise UserError(f"{run}: expected a run of full fine-tuning, got {one.record['method']}")
        if one.record["data"]["fingerprints"] != data.fingerprints:
            raise UserError(f"{run}: its rows are not those of {data.source} now")
    predictors = [Predictor(one, "auto", one.record["config"]["precision"]) for one in saved]

    def score(predict) -> list[str]:
        found = []
        for split in ("validation", "test"):
            labels = np.asarray(data.splits[split]["label"][:])
            probabilities = predict(data.splits[split]["text"][:])
            found.append(classification_metrics(labels, probabilities.argmax(axis=1), probabilities.shape[1]))
        return [f"{found[0]['accuracy']:.4f}", f"{found[1]['accuracy']:.4f}", f"{found[1]['precision']:.4f}"]

    lines = ["| runs | val. accuracy | test accuracy | test precision |", "|---|---|---|---|"]
    named = [(run.name, predictor) for run, predictor in zip(runs, predictors)]
    named.append(("mean probabilities", lambda texts: np.mean([predict(texts) for predict in predictors], axis=0)))
    lines += [f"| {' | '.join([name, *score(predict)])} |" for name, predict in named]
    first, *others = (predictor.model for predictor in predictors)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            parameter.copy_(torch.stack([parameter, *(other.get_parameter(name) for other in others)]).mean(dim=0))
    predictors[0].read_weights()
    return [*lines, f"| {' | '.join(['mean weights', *score(predictors[0])])} |"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--dataset_dir", help="look for the data set here first")
    words = parser.parse_args()
    try:
        print("\n".join(rows_of(words.runs, words.dataset_dir)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
