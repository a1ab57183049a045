"""Pictures of runs and cells, made from their records alone. Each function gives a figure; two ways to write one."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from records import Cell, read_lines

INK, PAPER = "#010203", "#fefefe"  # stand for the page's own colours when a figure becomes SVG
# Dark enough for letters on white; the page has lighter ones of the same names for the dark.
COLOURS = {"blue": "#0072b2", "orange": "#c75300", "green": "#00805c", "pink": "#b8478a", "ochre": "#9a6a00"}
COLOURS |= {"purple": "#7a5195", "grey": "#6f6f6f"}
BLUE, GREY = COLOURS["blue"], COLOURS["grey"]
STYLE = (
    {
        "figure.dpi": 200,
        "figure.constrained_layout.use": True,
        "figure.figsize": (5.4, 3.8),  # on a phone as wide as on paper, so that its letters stay readable
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.2,
        "font.size": 10.5,
        "legend.frameon": False,
        "axes.prop_cycle": matplotlib.cycler(color=list(COLOURS.values())[:-1]),
        "svg.fonttype": "none",
        "text.parse_math": False,  # a $ in a file's name is a dollar
    }
    | dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    )
)


styled = plt.rc_context(STYLE)  # a decorator, too


@styled
def save_png(figure: Figure, path: Path) -> None:
    """On white, for the README and for paper."""
    figure.savefig(path, facecolor="white", metadata={"Software": None})


def to_svg(figure: Figure, title: str) -> str:
    """An <svg> element for a page: text stays text, in the page's colour; the same figure, the same letters.

    `title` keeps the ids of one picture apart from those of another on the same page.
    """
    out = io.StringIO()
    with plt.rc_context({**STYLE, "svg.hashsalt": title, "svg.id": title}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--page)")
    for name, value in COLOURS.items():
        text = text.replace(value, f"var(--{name})")
    return text


def colours(variants: list[str]) -> dict[str, str]:
    """One colour a method: full is blue, the baseline grey, the others take the rest in their order."""
    rest = iter(list(COLOURS.values())[1:-1] * len(variants))
    fixed = {"full": BLUE, "baseline": GREY}
    return {name: fixed.get(name) or next(rest) for name in variants}


@styled
def curves(cells: dict[str, Cell], key: str, label: str) -> Figure:
    """A line a cell over the epochs, its mean over seeds, with a band from the lowest to the highest seed."""
    figure, axes = plt.subplots()
    colour = colours(list(cells))
    last = max((cell.first.curve["epoch"][-1] for cell in cells.values()), default=1) or 1
    ends = []
    for name, cell in cells.items():
        values = np.array([run.curve[key] for run in cell.runs])  # [seeds, epochs]
        epochs, mean = cell.first.curve["epoch"], values.mean(axis=0)
        if epochs == [0]:  # the baseline has no epochs: a level line
            epochs, values, mean = [0, last], np.repeat(values, 2, axis=1), np.repeat(mean, 2)
        style = {"linestyle": "--"} if epochs[0] == 0 else {"marker": "o", "markersize": 3}
        axes.plot(epochs, mean, color=colour[name], linewidth=1.6, **style)
        axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour[name], alpha=0.2, linewidth=0)
        ends.append((epochs[-1], mean[-1], cell.name, colour[name]))
    first = 0 if last == 1 else 1
    margin = 0.02 * (last - first)  # else the markers at the ends are cut
    axes.set(xlabel="epoch", ylabel=label, xlim=(first - margin, last + margin))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label_ends(axes, ends)
    return figure


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Name the lines at their right ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    ends = sorted(ends, key=lambda end: end[1])
    places = _apart([end[1] for end in ends], 0.06 * (high - low), high)
    for (x, y, name, colour), place in zip(ends, places):
        _label(axes, (x, y), (right + 0.04 * (right - left), place), "data", name, colour)


def _apart(wanted: list[float], step: float, most: float) -> list[float]:
    """Places near the wanted ones (rising), at least `step` apart, none above `most`."""
    places = list(wanted)
    for at in range(1, len(places)):
        places[at] = max(places[at], places[at - 1] + step)
    for at in reversed(range(len(places))):
        places[at] = min(places[at], most)
        most = places[at] - step
    return places


def _label(
    axes: Axes, point: tuple[float, float], place: tuple[float, float], system: str, name: str, colour: str
) -> None:
    arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
    arrow["relpos"] = (0, 0.5)
    words = {"fontsize": 9, "va": "center", "ha": "left", "color": colour}
    axes.annotate(name, point, place, "data", system, annotation_clip=False, arrowprops=arrow, **words)


@styled
def forest(names: list[str], values: list[tuple[float, float, float]], shown: list[bool], label: str) -> Figure:
    """Differences (value, low, high) with their intervals, one a line; filled where one is shown."""
    figure, axes = plt.subplots(figsize=(5.4, 1 + 0.34 * len(names)))
    places = np.arange(len(names))[::-1]
    for place, (value, low, high), sure in zip(places, values, shown):
        axes.plot([low, high], [place, place], color=BLUE, linewidth=1.6)
        axes.plot(value, place, "o", color=BLUE, markersize=6, markerfacecolor=BLUE if sure else PAPER)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(places, names, fontsize=9)
    axes.set(xlabel=label, ylim=(-0.6, len(names) - 0.4))
    axes.grid(axis="y", visible=False)
    return figure


@styled
def against(points: list[tuple[str, str, float, float, float, float, bool]], label: str) -> Figure:
    """Test accuracy (value, low, high) against a cost, on a log axis. points: (variant, name, cost, value, low, high,
    named)."""
    figure, axes = plt.subplots()
    colour = colours(list(dict.fromkeys(point[0] for point in points)))
    axes.set_xscale("log")
    named = []
    for variant, name, x, value, low, high, is_named in points:
        shade = {"color": colour[variant], "alpha": 1.0 if is_named else 0.4}
        axes.plot([x, x], [low, high], linewidth=1.2, **shade)
        axes.plot(x, value, "o", markersize=5 if is_named else 3, **shade)
        if is_named:
            named.append((x, value, name, colour[variant]))
    axes.set(xlabel=label, ylabel="test accuracy")
    axes.margins(x=0.1)
    engineering = EngFormatter(sep="")  # 1k, 10k, 1M; but 0.5, not 500m
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1 else engineering(value))
    axes.xaxis.set_minor_formatter(NullFormatter())
    decades = np.ptp(np.log10(axes.get_xlim()))
    if decades < 2:  # one power of ten may lie there, or none
        axes.xaxis.set_major_locator(MaxNLocator(4) if decades < 1 else LogLocator(subs=(1, 3)))
    _label_points(axes, named)
    return figure


def _label_points(axes: Axes, named: list[tuple[float, float, str, str]]) -> None:
    """Name the points at the right edge, moved apart where names would overlap."""
    low, high = axes.get_ylim()
    named = sorted(named, key=lambda point: point[1])
    places = _apart([(y - low) / (high - low) for _, y, _, _ in named], 0.07, 1.0)
    for (x, y, name, colour), place in zip(named, places):
        _label(axes, (x, y), (1.04, place), "axes fraction", name, colour)


@styled
def calibration(cell: Cell) -> Figure:
    """How often a prediction is right, by how sure it was: ten bins of like size, all seeds together."""
    confidence = np.concatenate([run.confidence for run in cell.runs])
    right = np.concatenate([run.predicted == run.rows.labels for run in cell.runs])
    figure, axes = plt.subplots(figsize=(4.6, 4))
    low = 1 / len(cell.first.data["labels"])
    axes.plot([low, 1], [low, 1], color=INK, linestyle=":", linewidth=1, label="perfectly calibrated")
    bins = [part for part in np.array_split(np.argsort(confidence, kind="stable"), 10) if len(part)]
    x, y = [confidence[part].mean() for part in bins], [right[part].mean() for part in bins]
    seeds = f"{len(cell.runs)} seed{'s' * (len(cell.runs) > 1)}"
    axes.plot(x, y, "o-", color=BLUE, markersize=4, label=f"{cell.name} ({seeds})")
    axes.set(xlabel="mean probability of the predicted class", ylabel="share that is right")
    axes.legend(fontsize=9, loc="upper left")
    return figure


def calibration_error(cell: Cell) -> float:
    """Expected calibration error (Naeini et al. 2015) over ten bins of like size, mean over seeds."""
    found = []
    for run in cell.runs:
        right = run.predicted == run.rows.labels
        bins = [part for part in np.array_split(np.argsort(run.confidence, kind="stable"), 10) if len(part)]
        gaps = [len(part) * abs(run.confidence[part].mean() - right[part].mean()) for part in bins]
        found.append(sum(gaps) / len(right))
    return float(np.mean(found))


@styled
def confusion(cell: Cell) -> Figure:
    """True against predicted class: rows a run, mean over seeds, and their share of the true class. Above twenty
    classes the shares alone, as colours: there is room for no more."""
    names = cell.first.data["labels"]
    few = len(names) <= 20
    counts = np.zeros((len(names), len(names)))
    for run in cell.runs:
        np.add.at(counts, (run.rows.labels, run.predicted), 1 / len(cell.runs))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(1.8 + 1.1 * len(names), 1.6 + 0.95 * len(names)) if few else (8, 7.5))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape) if few else ():
        shade = "white" if shares[row, column] > 0.7 else "black"
        text = f"{counts[row, column]:.0f}\n{shares[row, column]:.1%}"
        axes.text(column, row, text, ha="center", va="center", color=shade)
    if few:
        ticks = range(len(names))
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names, rotation=90, va="center")
    axes.set(xlabel="predicted", ylabel="true")
    axes.grid(visible=False)
    return figure


@styled
def draw_curves(folder: Path, best_epoch: int) -> None:
    """`folder`/curves.png: loss (train and validation) and the validation metrics of one fine-tuned run."""
    lines = read_lines(folder / "metrics.jsonl")

    def series(key: str) -> tuple[list[float], list[float]]:
        numbers = [line for line in lines if isinstance(line.get(key), (int, float))]
        return [line["epoch"] for line in numbers], [line[key] for line in numbers]

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    left.plot(*series("train/loss"), alpha=0.35, color="C0", linewidth=1)
    left.plot(*_smooth(*series("train/loss")), color="C0", label="train (smoothed)")
    left.plot(*series("val/loss"), marker="o", color="C1", label="validation")
    left.set(xlabel="epoch", ylabel="loss (cross-entropy, nats)", ylim=(0, None))
    for metric in ("accuracy", "precision", "recall", "f1"):
        right.plot(*series(f"val/{metric}"), marker="o", label=metric)
    right.axvline(best_epoch, color="0.6", linestyle=":", label="best epoch")
    right.set(xlabel="epoch", ylabel="validation metric (share of 1)")
    for axes in (left, right):
        axes.legend()
        axes.set_xlim(0, None)
    figure.suptitle(folder.name, fontsize=10)
    figure.savefig(folder / "curves.png")
    plt.close(figure)


def _smooth(epochs: list[float], values: list[float], weight: float = 0.9) -> tuple[list[float], list[float]]:
    """Exponential moving average, corrected for its start."""
    smoothed, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + 1 - weight
        smoothed.append(mean / norm)
    return epochs, smoothed
