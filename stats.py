"""How far to trust numbers that come from a few seeds and one test set.

A run's metric varies with its seed and with the rows of the test set, and all runs are scored on the same rows. So an
interval is made of two parts, seeds first, then rows (Davison and Hinkley 1997, section 3.8, on such data):
- rows: resampled with replacement, the same draw for every run, so that comparisons stay paired;
- seeds: what the runs of a cell differ by beyond what the rows explain, drawn from Student's t, since three or five
  seeds are too few to resample: they would give intervals that are too short.
One seed tells nothing about others: its interval is over rows alone, and the reports say so. Beside a cell of several
seeds it is taken to vary as that does.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

DRAWS = 10_000
CONFIDENCE = 0.95
POWER = 0.8
BLOCK = 20_000_000  # entries of a block of row weights


@dataclass(frozen=True)
class Estimate:
    """A cell's mean over its seeds."""

    mean: float
    sd: float | None  # between seeds; None for one seed
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A contrast of cells, such as the mean of one less that of another."""

    value: float
    low: float
    high: float
    p: float  # two-sided, from the same draws as the interval
    # The true difference that would be found in 80% of repetitions with new seeds and rows; above 1 where none would.
    # None where every cell has one seed: what seeds do is unknown.
    detectable: float | None
    seeds: tuple[int, ...]  # of each cell


@dataclass(frozen=True)
class Scores:
    """A metric of the runs of one cell on one test set."""

    observed: np.ndarray  # [runs]
    resampled: np.ndarray  # [draws, runs]: with the rows drawn anew; the same rows in the same line
    seeded: bool = True  # whether another seed would give another run (a baseline on all rows draws nothing)


def resample(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, draws: int = DRAWS, seed: int = 0
) -> dict[str, Scores]:
    """`accuracy` and `precision` (as in metrics.py) of every run, observed and with the rows drawn anew.

    labels: [n], predicted: [runs, n], class ids. The draw is fixed: the same rows, the same numbers. Counts are whole
    and exact in float32, so they are the same on every machine.
    """
    runs, n = predicted.shape
    classes = [1] if num_classes == 2 else list(range(num_classes))
    hits = predicted == labels
    called = np.stack([predicted == one for one in classes])  # [classes, runs, n]
    present = called | np.stack([labels == one for one in classes])[:, None]
    features = np.concatenate([hits[None], called & hits, called, present]).reshape(-1, n).T.astype(np.float32)
    rng, parts = np.random.default_rng(seed), [features.sum(axis=0)[None]]
    block = max(1, BLOCK // n)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        chosen = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        weights = np.bincount(chosen.ravel(), minlength=size * n).reshape(size, n).astype(np.float32)
        parts.append(weights @ features)
    counts = np.concatenate(parts).astype(np.float64).reshape(draws + 1, -1, runs)
    called_right, all_called, all_present = np.split(counts[:, 1:], 3, axis=1)  # each [1 + draws, classes, runs]
    averaged_over = np.maximum((all_present > 0).sum(axis=1), 1)  # the classes that a row or a prediction has
    precision = (called_right / np.maximum(all_called, 1)).sum(axis=1) / averaged_over
    found = {"accuracy": counts[:, 0] / n, "precision": precision}
    return {name: Scores(values[0], values[1:]) for name, values in found.items()}


def seed_variances(scores: Scores) -> tuple[float, float]:
    """(variance between seeds, variance between runs), the first without what the second owes to the rows.

    Runs deviate from their mean by their seeds and by rows they happen to get right or wrong; the resampled rows
    show how large the second part is.
    """
    between_runs = float(scores.observed.var(ddof=1))
    deviations = scores.resampled - scores.resampled.mean(axis=1, keepdims=True)
    from_rows = deviations.var(axis=0).sum() / (len(scores.observed) - 1)
    return max(0.0, between_runs - from_rows), between_runs


def seed_draws(parts: list[tuple[float, Scores]], rng: np.random.Generator) -> np.ndarray | float:
    """[draws]: the error of sum of weight x mean that comes from the seeds, by Student's t.

    As in the t-test of two samples, the cells of one contrast share a variance; that of the whole report is not
    used, since high learning rates vary more. It is known the less, the more of the variance between runs had to be
    taken off: Satterthwaite's degrees of freedom for such a difference, kept within Welch's bounds. A cell with one
    seed tells nothing of the variance, but has it too: without that, one seed against five gave 24% false alarms, not
    5 (seeds that differ by 2.4 points, 1,066 rows). 0 where no cell has two.
    """
    several = [(weight, scores) for weight, scores in parts if scores.seeded and len(scores.observed) > 1]
    if not several:
        return 0.0
    freedom = [len(scores.observed) - 1 for _, scores in several]
    variance, between_runs = np.average([seed_variances(scores) for _, scores in several], axis=0, weights=freedom)
    if variance == 0:
        return 0.0
    degrees = np.clip(sum(freedom) * (variance / between_runs) ** 2, min(freedom), sum(freedom))
    spread = math.sqrt(variance * sum(weight**2 / len(scores.observed) for weight, scores in parts if scores.seeded))
    # Evenly spaced quantiles in random order, not random draws: far out, 10,000 of those still miss by some percent.
    draws = len(parts[0][1].resampled)
    return spread * rng.permutation(stats.t.ppf((np.arange(draws) + 0.5) / draws, degrees))


def estimate(scores: Scores) -> Estimate:
    """Mean over seeds with its 95% interval over seeds and rows."""
    draws = scores.resampled.mean(axis=1) + seed_draws([(1, scores)], np.random.default_rng(1))
    low, high = _interval(np.clip(draws, 0, 1))
    sd = float(scores.observed.std(ddof=1)) if len(scores.observed) > 1 else None
    return Estimate(float(scores.observed.mean()), sd, low, high)


def contrast(parts: list[tuple[float, Scores]], paired: bool = True) -> Difference:
    """sum of weight x mean over seeds, for cells scored on the same rows.

    `paired=False`: each on rows of its own, whose draws are made independent of each other.
    """
    rng = np.random.default_rng(2)
    draws = np.zeros(len(parts[0][1].resampled))
    for weight, scores in parts:
        means = scores.resampled.mean(axis=1)
        draws += weight * (means if paired else rng.permutation(means))
    draws += seed_draws(parts, rng)
    value = float(sum(weight * scores.observed.mean() for weight, scores in parts))
    low, high = _interval(draws)
    beyond = np.abs(draws - draws.mean()) >= abs(value) - 1e-12
    p = (1 + int(beyond.sum())) / (1 + len(draws))
    needed = stats.norm.ppf(1 - (1 - CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    # The interval's half width, not the standard deviation: Student's t with two degrees of freedom has none.
    error = (high - low) / 2 / stats.norm.ppf(1 - (1 - CONFIDENCE) / 2)
    seeds = tuple(len(scores.observed) for _, scores in parts)
    detectable = float(needed * error) if max(seeds) > 1 else None
    # Each mean lies between 0 and 1; Student's t of two seeds does not know that.
    least, most = (sum(bound(weight, 0) for weight, _ in parts) for bound in (min, max))
    low, high = np.clip((low, high), least, most).tolist()
    return Difference(value, low, high, p, detectable, seeds)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def mcnemar_over_seeds(right_a: np.ndarray, right_b: np.ndarray) -> tuple[float, list[float]]:
    """McNemar's exact test for each pair of runs, and one p for them all. right_a, right_b: [seeds, n] bool.

    The tests share their test rows, so they depend on each other and Fisher's or Stouffer's method would claim too
    much; twice the mean of p-values is valid whatever the dependence (Vovk and Wang 2020). It is about these runs,
    not about other seeds; `contrast` is about both, and is what reports correct for their number.
    """
    found = []
    for a, b in zip(right_a, right_b, strict=True):
        table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
        found.append(float(mcnemar(table, exact=True).pvalue))
    combined = found[0] if len(found) == 1 else min(1.0, 2 * float(np.mean(found)))
    return combined, found


def holm(p: list[float]) -> list[float]:
    """p-values corrected for their number: the chance of one false alarm among all stays below 5%."""
    return [float(value) for value in multipletests(p, method="holm")[1]] if p else []
