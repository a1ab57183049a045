"""Pictures and tables, made from the saved records of runs alone."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from config import TrainConfig, UserError

STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "legend.frameon": False,
    "axes.prop_cycle": matplotlib.cycler(
        color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
    ),
}


@dataclass(frozen=True)
class Run:
    """The records of one finished run."""

    name: str
    result: dict[str, Any]
    metrics: list[dict[str, float]]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(epochs, values) of one key of metrics.jsonl."""
        lines = [line for line in self.metrics if isinstance(line.get(key), (int, float))]
        return [line["epoch"] for line in lines], [line[key] for line in lines]


def read_run(folder: Path) -> Run:
    """Raises UserError where `folder` holds no finished run."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if not isinstance(result, dict) or "test" not in result:
            raise ValueError("result.json holds no test metrics")
        return Run(folder.name, result, _read_metrics(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: expected a finished run: {error}") from error


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def draw_curves(folder: Path, best_epoch: int) -> None:
    """`folder`/curves.png: loss (train and validation) and the validation metrics of one fine-tuned run."""
    run = Run(folder.name, {}, _read_metrics(folder))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
        left.plot(*run.series("train/loss"), alpha=0.35, color="C0", linewidth=1)
        left.plot(*_smooth(*run.series("train/loss")), color="C0", label="train (smoothed)")
        left.plot(*run.series("val/loss"), marker="o", color="C1", label="validation")
        left.set(xlabel="epoch", ylabel="loss (cross-entropy, nats)", ylim=(0, None))
        for metric in ("accuracy", "precision", "recall", "f1"):
            right.plot(*run.series(f"val/{metric}"), marker="o", label=metric)
        right.axvline(best_epoch, color="0.6", linestyle=":", label="best epoch")
        right.set(xlabel="epoch", ylabel="validation metric (share of 1)")
        for axes in (left, right):
            axes.legend()
            axes.set_xlim(0, None)
        figure.suptitle(run.name, fontsize=10)
        figure.savefig(folder / "curves.png")
        plt.close(figure)


def _smooth(epochs: list[float], values: list[float], weight: float = 0.9) -> tuple[list[float], list[float]]:
    """Exponential moving average, corrected for its start."""
    smoothed, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + 1 - weight
        smoothed.append(mean / norm)
    return epochs, smoothed


def report(config: TrainConfig) -> None:
    """Draw plots/loss.png and plots/precision.png over the runs, and print their table as Markdown."""
    folders = [Path(run) for run in config.runs] or sorted(
        path.parent for path in Path(config.output_dir).glob("*/result.json")
    )
    if not folders:
        raise UserError(f"--report: no finished run in {config.output_dir}; make one with python main.py --finetune")
    found = [read_run(folder) for folder in folders]
    plots = Path(config.plots_dir)
    try:
        plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--plots_dir {plots}: cannot be written: {error.strerror}") from error
    with plt.rc_context(STYLE):
        for name, key, label in (
            ("loss", "val/loss", "validation loss (cross-entropy, nats)"),
            ("precision", "val/precision", "validation precision (share of 1)"),
        ):
            figure, axes = plt.subplots(figsize=(8, 4.5 + 0.18 * max(0, len(found) - 8)))
            last = max((run.series(key)[0][-1] for run in found if run.series(key)[0]), default=1) or 1
            for run in found:
                epochs, values = run.series(key)
                if epochs == [0]:  # the baseline has no epochs: a level line
                    axes.plot([0, last], values * 2, linestyle="--", label=run.name)
                else:
                    axes.plot(epochs, values, marker="o", markersize=4, label=run.name)
            axes.set(xlabel="epoch", ylabel=label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
            figure.savefig(plots / f"{name}.png")
            plt.close(figure)
            print(f"drew {plots / name}.png", file=sys.stderr)
    print(table(found))


def table(found: list[Run]) -> str:
    """Markdown: test metrics with 95% intervals over rows, cost, one line a run."""
    lines = [
        "| run | model | test accuracy (95%) | precision | recall | F1 | best epoch | trained | train s | samples/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in found:
        got, test = run.result, run.result["test"]
        low, high = test["accuracy_interval"]
        lines.append(
            f"| {run.name} | {got['model']['name']} | {test['accuracy']:.4f} ({low:.3f}-{high:.3f}) "
            f"| {test['precision']:.4f} | {test['recall']:.4f} | {test['f1']:.4f} | {got['best_epoch'] or '-'} "
            f"| {got['trainable_parameters']:,} | {got['train_seconds']:.0f} | {got['samples_per_second']:.0f} |"
        )
    return "\n".join(lines)
