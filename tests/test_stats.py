"""The statistics on simulated runs, whose true answer is known."""

import numpy as np
import pytest

import stats

ROWS, DRAWS = 400, 500


def simulate(rng, seeds: tuple[int, int], gain: float, seed_effect: float, noise: float = 0.5):
    """(labels, [runs, n] of A, of B): rows are easy or hard for both; a run is a seed's luck on top.

    A row is right where its easiness + the method's gain + the seed's effect + noise is above 0.
    """
    easy = rng.normal(1.0, 1.0, ROWS)
    labels = rng.integers(0, 2, ROWS)

    def runs(count, shift):
        effects = shift + seed_effect * rng.standard_normal((count, 1))
        right = easy + effects + noise * rng.standard_normal((count, ROWS)) > 0
        return np.where(right, labels, 1 - labels)

    return labels, runs(seeds[0], gain), runs(seeds[1], 0.0)


def true_accuracy(shift, seed_effect, noise=0.5):
    from scipy.stats import norm

    return norm.cdf((1.0 + shift) / np.sqrt(1 + seed_effect**2 + noise**2))


def compared(rng, seeds, gain, seed_effect, metrics=("accuracy",)):
    """For each metric (the difference of A and B, the value of A), on the same runs and rows."""
    labels, a, b = simulate(rng, seeds, gain, seed_effect)
    resampled = stats.resample(labels, np.concatenate([a, b]), 2, DRAWS, int(rng.integers(2**31)))
    for scores in (resampled[metric] for metric in metrics):
        split = [stats.Scores(scores.observed[part], scores.resampled[:, part]) for part in _parts(seeds)]
        yield stats.contrast([(1, split[0]), (-1, split[1])]), stats.estimate(split[0])


def _parts(seeds):
    return slice(0, seeds[0]), slice(seeds[0], sum(seeds))


@pytest.mark.parametrize(
    ("seeds", "seed_effect"), [((1, 1), 0.0), ((5, 5), 0.0), ((5, 5), 0.1), ((3, 5), 0.1), ((3, 3), 0.2), ((2, 2), 0.1)]
)
def test_false_alarms_and_coverage(seeds, seed_effect):
    """600 repetitions: where the true rate is 5%, two standard errors are 1.8%. An effect of 0.1 is 2.5 points between
    seeds, 0.2 is 5: more than is usual here. Then the intervals err on the safe side for a difference of two cells of
    three seeds; for one such cell they cover a little less, since accuracy is skewed."""
    rng, metrics = np.random.default_rng(0), ("accuracy", "precision")
    found = {metric: [] for metric in metrics}
    truth = true_accuracy(0.0, seed_effect)  # of precision, too: the labels are fair coins, independent of the rest
    for _ in range(600):
        for metric, (difference, cell) in zip(metrics, compared(rng, seeds, 0.0, seed_effect, metrics)):
            covered = difference.low <= 0 <= difference.high
            found[metric].append((difference.p < 0.05, covered, cell.low <= truth <= cell.high))
    for metric, some in found.items():
        alarms, covered, cell_covered = np.mean(some, axis=0)
        print(metric, seeds, seed_effect, alarms, covered, cell_covered)
        assert 0.02 <= alarms <= 0.068, metric
        assert 0.932 <= covered <= 0.98, metric
        assert 0.92 <= cell_covered <= 0.98, metric


def test_without_the_seed_level_intervals_would_be_too_short():
    """The reason for it: over rows alone, seeds that differ are taken for methods that differ."""
    rng, alarms = np.random.default_rng(0), []
    for _ in range(200):
        labels, a, b = simulate(rng, (3, 3), 0.0, 0.3)
        scores = stats.resample(labels, np.concatenate([a, b]), 2, DRAWS)["accuracy"]
        draws = scores.resampled[:, :3].mean(axis=1) - scores.resampled[:, 3:].mean(axis=1)
        low, high = np.percentile(draws, [2.5, 97.5])
        alarms.append(not low <= 0 <= high)
    assert np.mean(alarms) > 0.15


def test_one_seed_against_five_varies_as_those_do():
    """0.1 is 2.5 points between seeds. Were the one taken to be all there is, a third would be false alarms."""
    rng, alarms, ignored = np.random.default_rng(3), [], []
    for _ in range(300):
        labels, a, b = simulate(rng, (1, 5), 0.0, 0.1)
        scores = stats.resample(labels, np.concatenate([a, b]), 2, DRAWS)["accuracy"]
        one, five = (stats.Scores(scores.observed[part], scores.resampled[:, part]) for part in _parts((1, 5)))
        alarms.append(stats.contrast([(1, one), (-1, five)]).p < 0.05)
        unseeded = stats.Scores(one.observed, one.resampled, seeded=False)  # a baseline, which draws nothing
        ignored.append(stats.contrast([(1, unseeded), (-1, five)]).p < 0.05)
    print(np.mean(alarms), np.mean(ignored))
    assert 0.02 <= np.mean(alarms) <= 0.09 and np.mean(ignored) > 0.15


def test_of_single_seeds_nobody_knows_what_could_be_detected():
    (difference, _) = next(compared(np.random.default_rng(4), (1, 1), 0.0, 0.0))
    assert difference.detectable is None


@pytest.mark.parametrize(("seeds", "seed_effect"), [((5, 5), 0.0), ((5, 5), 0.05)])
def test_the_detectable_difference_is_found_in_80_percent(seeds, seed_effect):
    rng = np.random.default_rng(1)
    guesses = [next(compared(rng, seeds, 0.0, seed_effect))[0].detectable for _ in range(40)]
    wanted, base = float(np.mean(guesses)), true_accuracy(0.0, seed_effect)
    gain = next(g for g in np.arange(0, 1, 0.002) if true_accuracy(g, seed_effect) - base >= wanted)
    found = np.mean([next(compared(rng, seeds, gain, seed_effect))[0].p < 0.05 for _ in range(300)])
    print(seeds, wanted, gain, found)
    assert 0.73 <= found <= 0.9


def test_mcnemar_over_seeds_and_holm():
    rng, alarms = np.random.default_rng(2), []
    for _ in range(400):
        labels, a, b = simulate(rng, (5, 5), 0.0, 0.0)
        alarms.append(stats.mcnemar_over_seeds(a == labels, b == labels)[0] < 0.05)
    assert np.mean(alarms) <= 0.05  # valid, and cautious
    right = np.array([[True] * 30 + [False] * 10])
    wrong = np.array([[False] * 10 + [True] * 20 + [False] * 10])
    p, each = stats.mcnemar_over_seeds(right, wrong)
    assert p == each[0] == pytest.approx(2 * 0.5**10)  # ten rows differ, all one way: a fair coin's ten heads
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []


def test_resampled_metrics_are_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, precision_score

    rng = np.random.default_rng(3)
    for classes in (2, 4, 7):
        labels, predicted = rng.integers(0, classes, 50), rng.integers(0, classes, (3, 50))
        if classes == 7:  # no row and no prediction of the last one, one row of another: draws lack that, too
            labels, predicted = labels % 5, predicted % 5
            labels[0] = 5
        found = stats.resample(labels, predicted, classes, draws=20)
        average = "binary" if classes == 2 else "macro"
        for run in range(3):
            assert found["accuracy"].observed[run] == pytest.approx(accuracy_score(labels, predicted[run]))
            wanted = precision_score(labels, predicted[run], average=average, zero_division=0)
            assert found["precision"].observed[run] == pytest.approx(wanted)
        for draw, rows in enumerate(np.random.default_rng(0).integers(0, 50, (20, 50))):
            wanted = precision_score(labels[rows], predicted[1][rows], average=average, zero_division=0)
            assert found["precision"].resampled[draw, 1] == pytest.approx(wanted)


def test_a_contrast_with_itself_is_nothing():
    rng = np.random.default_rng(4)
    labels, a, _ = simulate(rng, (3, 1), 0.0, 0.1)
    scores = stats.resample(labels, a, 2, DRAWS)["accuracy"]
    one = stats.Scores(scores.observed[:1], scores.resampled[:, :1])
    nothing = stats.contrast([(1, one), (-1, one)])
    assert (nothing.value, nothing.low, nothing.high, nothing.p) == (0.0, 0.0, 0.0, 1.0)
    assert stats.contrast([(1, one), (-1, one)], paired=False).high > 0


def test_a_baseline_of_many_seeds_tells_nothing_of_the_seeds_of_others():
    """Its runs are one run: they would make the variance of the other cell look smaller."""
    rng = np.random.default_rng(6)
    labels, a, b = simulate(rng, (3, 1), 0.0, 0.3)
    scores = stats.resample(labels, np.concatenate([a, b, b, b, b]), 2, DRAWS)["accuracy"]
    three = stats.Scores(scores.observed[:3], scores.resampled[:, :3])
    parts = (slice(3, 4), slice(3, 7))
    one, four = (stats.Scores(scores.observed[part], scores.resampled[:, part], seeded=False) for part in parts)
    alone, again = (stats.contrast([(1, three), (-1, other)]) for other in (one, four))
    assert (alone.low, alone.high) == pytest.approx((again.low, again.high))


def test_an_interval_of_a_difference_stays_where_differences_can_be():
    """Two seeds 80 points apart: Student's t reaches far beyond 100 points, p and the detectable difference with it."""
    rows = np.random.default_rng(5).normal(0, 0.01, (DRAWS, 2))
    one, two = (stats.Scores(np.array(seeds), np.array(seeds) + rows) for seeds in ([0.1, 0.9], [0.2, 0.8]))
    found = stats.contrast([(1, one), (-1, two)])
    assert (found.low, found.high) == (-1, 1) and found.detectable > 1
    found = stats.contrast([(1, one), (-1, two), (-1, two), (1, one)])  # of two differences
    assert -2 <= found.low < -1 and 1 < found.high <= 2
