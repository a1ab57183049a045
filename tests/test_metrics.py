"""Metrics against scikit-learn, intervals against simulation."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score

import metrics


def by_sklearn(labels, predicted, classes: int) -> dict[str, float]:
    how = {"zero_division": 0}
    how |= {"average": "binary" if classes == 2 else "macro"}
    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    named = {name: score(labels, predicted, **how) for name, score in scores.items()}
    macro = f1_score(labels, predicted, average="macro", zero_division=0)
    return {"accuracy": accuracy_score(labels, predicted), **named, "macro_f1": macro}


def draw(classes: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=rng.dirichlet(np.full(classes, 2.0)))
    return labels, np.where(rng.random(n) < 0.7, labels, rng.integers(0, classes, n))


CASES = {
    f"{classes} classes, draw {seed}": (classes, *draw(classes, 150, seed)) for classes in (2, 3, 5) for seed in (0, 1)
}
CASES |= {
    "perfect": (2, np.array([0, 1, 1]), np.array([0, 1, 1])),
    "all wrong": (2, np.array([0, 1, 1]), np.array([1, 0, 0])),
    "never called positive": (2, np.array([0, 1, 1]), np.array([0, 0, 0])),
    "no positive row": (2, np.array([0, 0, 0]), np.array([0, 1, 0])),
    "nothing positive at all": (2, np.array([0, 0]), np.array([0, 0])),
    "only positive rows": (2, np.array([1, 1]), np.array([1, 1])),
    "one row": (2, np.array([1]), np.array([0])),
    "a class without rows": (4, np.array([0, 1, 1, 3]), np.array([0, 1, 3, 3])),
    "a class called but absent": (3, np.array([0, 1, 1]), np.array([2, 1, 1])),
    "one class of three": (3, np.array([2, 2]), np.array([2, 2])),
}


@pytest.mark.parametrize("case", CASES)
def test_metrics_equal_scikit_learn(case):
    classes, labels, predicted = CASES[case]
    found = metrics.classification_metrics(labels, predicted, classes)
    assert found == pytest.approx(by_sklearn(labels, predicted, classes), abs=1e-12)
    assert tuple(found) == (*metrics.METRICS, "macro_f1") and all(type(value) is float for value in found.values())


@pytest.mark.parametrize("case", CASES)
def test_intervals_hold_the_estimate_and_are_repeatable(case):
    classes, labels, predicted = CASES[case]
    point = metrics.classification_metrics(labels, predicted, classes)
    found = metrics.intervals(labels, predicted, classes)
    assert found == metrics.intervals(labels, predicted, classes)
    for name, (low, high) in found.items():
        assert 0 <= low <= point[name] + 1e-12 and point[name] - 1e-12 <= high <= 1, name
    half = metrics.intervals(labels, predicted, classes, confidence=0.5)
    assert all(half[name][1] - half[name][0] <= high - low for name, (low, high) in found.items())
    order = np.random.default_rng(0).permutation(len(labels))
    assert found == metrics.intervals(labels[order], predicted[order], classes)


@pytest.mark.parametrize("case", CASES)
def test_the_bootstraps_metrics_are_the_same_metrics(case):
    classes, labels, predicted = CASES[case]
    matrix = np.zeros((1, classes, classes), int)
    np.add.at(matrix[0], (labels, predicted), 1)
    found = {name: float(values[0]) for name, values in metrics._from_confusion(matrix).items()}
    assert found == pytest.approx(by_sklearn(labels, predicted, classes), abs=1e-12)


@pytest.mark.parametrize(
    ("confusion", "n"),
    [
        ([[0.42, 0.08], [0.07, 0.43]], 300),  # as a good model on balanced reviews
        ([[0.85, 0.03], [0.04, 0.08]], 300),  # a rare positive class
        ([[0.30, 0.02, 0.03], [0.02, 0.28, 0.03], [0.04, 0.03, 0.25]], 300),
    ],
)
def test_intervals_cover_the_truth_95_times_in_100(confusion, n, monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 1000)  # for speed
    cells = np.array(confusion)
    classes, draws = len(cells), 600
    truth = {name: float(values[0]) for name, values in metrics._from_confusion(np.rint(100 * cells)[None]).items()}
    rng = np.random.default_rng(0)
    covered = dict.fromkeys((*metrics.METRICS, "macro_f1"), 0)
    for _ in range(draws):
        labels, predicted = np.divmod(rng.choice(cells.size, n, p=cells.ravel()), classes)
        for name, (low, high) in metrics.intervals(labels, predicted, classes).items():
            covered[name] += low <= truth[name] <= high
    noise = 3.3 * np.sqrt(0.95 * 0.05 / draws)  # 1 in 1,000 for each figure
    for name, hits in covered.items():
        assert abs(hits / draws - 0.95) < noise, (name, hits / draws)


def test_proportions_get_wilsons_interval():
    labels = np.repeat([1, 1, 0, 0], [40, 10, 5, 45])
    predicted = np.repeat([1, 0, 1, 0], [40, 10, 5, 45])
    found = metrics.intervals(labels, predicted, 2)
    z = 1.959963984540054
    for name, hits, n in (("accuracy", 85, 100), ("precision", 40, 45), ("recall", 40, 50)):
        middle = (hits + z**2 / 2) / (n + z**2)
        half = z / (n + z**2) * np.sqrt(hits * (n - hits) / n + z**2 / 4)
        assert found[name] == pytest.approx((middle - half, middle + half), rel=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_score_equals_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    labels, probabilities = rng.integers(0, classes, 200), rng.dirichlet(np.ones(classes), 200)
    found = metrics.score(labels, probabilities)
    assert found.pop("loss") == pytest.approx(log_loss(labels, probabilities, labels=range(classes)), rel=1e-12)
    assert found == pytest.approx(by_sklearn(labels, probabilities.argmax(axis=1), classes))
    whole = metrics.score_with_intervals(labels, probabilities)
    assert whole["rows"] == 200 and set(whole) == {"loss", "rows", *found, *(f"{name}_interval" for name in found)}
    assert all(whole[f"{name}_interval"][0] <= whole[name] <= whole[f"{name}_interval"][1] for name in found)


def test_a_certain_mistake_costs_a_finite_loss():
    certain = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    assert metrics.score(np.array([0, 1]), certain)["loss"] == 0
    assert 80 < metrics.score(np.array([1, 0]), certain)["loss"] < 1000


def test_a_loss_of_nothing_is_no_negative_zero():
    for sure in (np.array([[1.0, 0.0]]), np.array([[1.0000001, 0.0]])):  # rounding may leave more than 1
        loss = metrics.score(np.array([0]), sure)["loss"]
        assert f"{loss:.4f}" == "0.0000"
    assert np.isnan(metrics.score(np.array([0]), np.array([[np.nan, np.nan]]))["loss"])
