"""Where runs are wrong, and what a quality costs: tables as tuples of strings, the head first."""

from itertools import combinations, pairwise

import numpy as np

from records import Cell

Table = tuple[tuple[str, ...], ...]
MISTAKES = 10
TEXT_LENGTH = 120


def agreement(cells: list[Cell], top: Cell) -> Table:
    """Each cell with itself under another seed, and with `top`: how often two runs say the same."""
    rows = [("cells", "same prediction", "both right", "only the first right", "only the second right", "both wrong")]
    for cell in cells:
        pairs = list(combinations(cell.runs, 2))
        if pairs:
            rows.append((f"{cell.name}, two seeds", *_agreement(pairs)))
    for cell in cells:
        if cell is not top:
            rows.append((f"{cell.name}, {top.name}", *_agreement([(a, b) for a in cell.runs for b in top.runs])))
    return tuple(rows)


def _agreement(pairs: list) -> list[str]:
    shares = []
    for a, b in pairs:
        right_a, right_b = a.predicted == a.rows.labels, b.predicted == b.rows.labels
        same = a.predicted == b.predicted
        shares.append([same, right_a & right_b, right_a & ~right_b, ~right_a & right_b, ~right_a & ~right_b])
    return [f"{share:.1%}" for share in np.mean(np.array(shares, float), axis=(0, 2))]


def by_kind_of_row(cells: list[Cell]) -> Table:
    """Mean test accuracy of each cell on short and long rows (quarters by length), with and without a negation."""
    rows = cells[0].first.rows
    edges = np.unique(np.quantile(rows.words, [0, 0.25, 0.5, 0.75, 1]).round().astype(int))
    kinds = {}
    for number, (low, high) in enumerate(pairwise(edges)):
        first = low + (number > 0)
        kinds[f"{first} to {high} words"] = (rows.words >= first) & (rows.words <= high)
    kinds |= {"with a negation": rows.negated, "without one": ~rows.negated}
    table = [("rows", "number", *(cell.name for cell in cells))]
    for name, chosen in kinds.items():
        if chosen.any():
            values = [np.mean([(run.predicted == rows.labels)[chosen].mean() for run in cell.runs]) for cell in cells]
            table.append((name, str(chosen.sum()), *(f"{value:.3f}" for value in values)))
    return tuple(table)


def mistakes(cell: Cell) -> Table:
    """The rows that the cell gets wrong with the highest mean probability; a seed that is right counts as 0."""
    rows, names = cell.first.rows, cell.first.data["labels"]
    wrong = np.stack([run.predicted != rows.labels for run in cell.runs])
    sureness = np.mean([np.where(w, run.confidence, 0.0) for w, run in zip(wrong, cell.runs)], axis=0)
    table = [("row", "label", "wrong in", "mean probability", "words", *(("text",) if rows.texts else ()))]
    for row in np.argsort(-sureness, kind="stable")[:MISTAKES]:
        if not sureness[row]:
            break
        line = (str(row), names[rows.labels[row]], f"{wrong[:, row].sum()} of {len(cell.runs)} seeds")
        line += (f"{sureness[row]:.3f}", str(rows.words[row]))
        if rows.texts:
            text = " ".join(rows.texts[row].split())
            line += (text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 1] + "…",)
        table.append(line)
    return tuple(table)


def time_to(cell: Cell, accuracy: float) -> str:
    """Seconds of training after which validation accuracy first reached `accuracy`: the median over the seeds that
    did, and how many did. What fills a cache is spent before the first epoch."""
    found = []
    for run in cell.runs:
        epochs = [e for e, value in zip(run.curve["epoch"], run.curve["val/accuracy"]) if value >= accuracy]
        if epochs:
            share = epochs[0] / run.config["epochs"] if run.method != "baseline" else 1
            before = run.facts.get("cache_seconds") or 0.0
            found.append(before + share * (run.facts["train_seconds"] - before))
    if not found:
        return "never"
    return f"{np.median(found):,.0f}" + (f" ({len(found)} of {len(cell.runs)})" if len(found) < len(cell.runs) else "")
