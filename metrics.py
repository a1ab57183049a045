"""Classification metrics and their 95% intervals, from predictions alone."""

import numpy as np

RESAMPLES = 10_000
METRICS = ("accuracy", "precision", "recall", "f1")


def classification_metrics(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of `predicted` against `labels` (both [n], class ids).

    Two classes: of class 1, the positive one. More: the unweighted (macro) mean over the classes that a row or a
    prediction has. `macro_f1` is that mean for two classes, too. A ratio with nothing in its denominator counts as 0.
    All are scikit-learn's.
    """
    from sklearn.metrics import f1_score, precision_recall_fscore_support  # here, since it takes a second to import

    binary = num_classes == 2
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels,
        predicted,
        labels=[1] if binary else None,
        average=None if binary else "macro",
        zero_division=0,
    )
    values = (np.mean(labels == predicted), *(np.mean(value) for value in (precision, recall, f1)))
    macro_f1 = f1_score(labels, predicted, average="macro", zero_division=0)
    return {**dict(zip(METRICS, map(float, values))), "macro_f1": float(macro_f1)}


def intervals(
    labels: np.ndarray, predicted: np.ndarray, num_classes: int, confidence: float = 0.95
) -> dict[str, tuple[float, float]]:
    """The interval of each metric over test sets of this size: what another draw of rows could have given.

    Proportions (accuracy; precision and recall of two classes) get Wilson's interval, which stays honest near
    0 and 1; the rest the percentile bootstrap. Resampling rows is drawing the cells of the confusion matrix
    from a multinomial, so 10,000 resamples take milliseconds. The draw is fixed: the same rows, the same interval.
    """
    from scipy import stats
    from sklearn.metrics import confusion_matrix

    matrix = confusion_matrix(labels, predicted, labels=range(num_classes))
    draws = np.random.default_rng(0).multinomial(matrix.sum(), matrix.ravel() / matrix.sum(), RESAMPLES)
    resampled = _from_confusion(draws.reshape(RESAMPLES, num_classes, num_classes))
    tail = 100 * (1 - confidence) / 2
    found = {name: tuple(np.percentile(values, [tail, 100 - tail])) for name, values in resampled.items()}
    proportions = {"accuracy": (np.trace(matrix), matrix.sum())}
    if num_classes == 2:
        proportions["precision"] = (matrix[1, 1], matrix[:, 1].sum())
        proportions["recall"] = (matrix[1, 1], matrix[1].sum())
    for name, (hits, trials) in proportions.items():
        if trials:
            wilson = stats.binomtest(int(hits), int(trials)).proportion_ci(confidence, method="wilson")
            found[name] = (wilson.low, wilson.high)
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def score(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """`loss` (mean cross-entropy in nats) and the metrics of one split. probabilities: [n, classes]."""
    chosen = probabilities[np.arange(len(labels)), labels]
    # 0 - x, not -x: no negative zero where every row is certain and right. Rounding may leave a probability above 1.
    loss = float(0.0 - np.log(np.clip(chosen, np.finfo(np.float64).tiny, 1.0)).mean())
    return {"loss": loss, **classification_metrics(labels, probabilities.argmax(axis=1), probabilities.shape[1])}


def score_with_intervals(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | list[float]]:
    """`score`, with `<metric>_interval` (95%, over rows) and the number of `rows`."""
    found = intervals(labels, probabilities.argmax(axis=1), probabilities.shape[1])
    bounds = {f"{name}_interval": list(bounds) for name, bounds in found.items()}
    return {**score(labels, probabilities), **bounds, "rows": len(labels)}


def _from_confusion(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of many confusion matrices at once. matrices: [draws, true class, predicted class]."""
    hits = np.diagonal(matrices, axis1=1, axis2=2)  # [draws, classes]
    called, actual = matrices.sum(axis=1), matrices.sum(axis=2)
    counted = (called + actual > 0).sum(axis=1)  # [draws]: classes that the mean is over
    macro_f1 = (2 * hits / np.maximum(called + actual, 1)).sum(axis=1) / counted
    if matrices.shape[1] == 2:
        hits, called, actual, counted = hits[:, 1:], called[:, 1:], actual[:, 1:], 1
    precision, recall = hits / np.maximum(called, 1), hits / np.maximum(actual, 1)
    f1 = 2 * hits / np.maximum(called + actual, 1)
    accuracy = np.trace(matrices, axis1=1, axis2=2) / matrices.sum(axis=(1, 2))
    return {
        "accuracy": accuracy,
        "precision": precision.sum(axis=1) / counted,
        "recall": recall.sum(axis=1) / counted,
        "f1": f1.sum(axis=1) / counted,
        "macro_f1": macro_f1,
    }
