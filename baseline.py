"""The linear baseline: LinearSVC on frozen embeddings, with the records of a fine-tuned run."""

import contextlib
import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

import models
import packaged
import runs
from config import TrainConfig, say
from data import TokenSplit, sorted_batches
from device import PeakMemory, tokens_at_once
from engine import state_reader
from metrics import score_with_intervals
from progress import progress_bar

C_GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
BATCH_SIZE = 64


def run_baseline(config: TrainConfig, source: models.ModelSource) -> Path:
    """Embed, choose C on validation, score test once. Returns the run folder."""
    job = runs.prepare(config, source)
    record = runs.describe(job) | {"pooling": choose_pooling(job.tokenizer)}
    runs.announce(job, record)
    memory, started = PeakMemory(job.accelerator.device, job.model), time.perf_counter()
    encoder, labels = record["model"]["fingerprint"], {name: split.labels for name, split in job.splits.items()}
    features = {name: cached_embeddings(job, name, encoder, record["pooling"]) for name in job.splits}
    embedded = time.perf_counter() - started
    weight, bias, best_c = fit_map(features, labels, job.data.num_classes, config.class_weights)
    seconds = time.perf_counter() - started

    probabilities = {name: softmax(features[name] @ weight.T + bias, axis=1) for name in ("validation", "test")}
    scores = {
        "val": score_with_intervals(labels["validation"], probabilities["validation"]),
        "test": score_with_intervals(labels["test"], probabilities["test"]),
    }
    record |= {
        "C": best_c,
        "best_epoch": None,
        "trainable_parameters": weight.size + bias.size,
        "total_parameters": weight.size + bias.size + sum(p.numel() for p in job.model.base_model.parameters()),
        "train_seconds": seconds,
        "cache_seconds": embedded,
        "samples_per_second": len(labels["train"]) / seconds,
        "memory_before_training_bytes": memory.start,
        "peak_memory_bytes": memory.peak(),
    }
    with runs.open_run(job, record) as (run_dir, logger):
        for split, values in scores.items():
            floats = {f"{split}/{name}": value for name, value in values.items() if isinstance(value, float)}
            logger.log(floats, step=0, epoch=0)
        if not job.accelerator.is_main_process:
            return run_dir
        with models.writing(run_dir):
            models.save_model(job.model.base_model, job.tokenizer, run_dir / "model", models.model_card(record, scores))
            save_file({"weight": weight, "bias": bias}, run_dir / "model" / "linear.safetensors")
            runs.write_outcome(job, run_dir, {**record, **scores}, probabilities["test"])
    runs.conclude(job, run_dir)
    return run_dir


def cached_embeddings(job: runs.Job, name: str, encoder: str, pooling: str) -> np.ndarray:
    """`embeddings` of a split, cached under the hash of what they were made from. encoder: its fingerprint."""
    content = f"{job.splits[name].key}|{encoder}|{job.cache_key}" + ("" if pooling == "cls" else "|mean")
    file = packaged.cache_dir() / "embeddings" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npy"
    if file.exists():
        with contextlib.suppress(ValueError, EOFError):  # a damaged file is made again
            return np.load(file, mmap_mode="r")
    device = job.accelerator.device
    found = embeddings(job.model, job.splits[name], device, job.precision, pooling, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with packaged.made_whole(file) as scratch, scratch.open("wb") as handle:
        np.save(handle, found)
    return found


@torch.inference_mode()
def embeddings(
    model: nn.Module,
    split: TokenSplit,
    device: torch.device,
    precision: str,
    pooling: str = "cls",
    name: str = "",
) -> np.ndarray:
    """[n, width] fp32: what `state_reader` makes of every row of `split`, in the order of the rows."""
    read = state_reader(model.to(device).eval(), precision, pooling)
    found = np.empty((len(split), model.config.hidden_size), np.float32)
    with progress_bar(len(split), f"embedding {name}") as bar:
        for indices in sorted_batches(split.lengths, BATCH_SIZE, tokens_at_once(device)):
            found[indices] = read(split.batch(indices).to(device)).cpu().numpy()
            bar.update(len(indices))
    return found


def choose_pooling(tokenizer: Any) -> str:
    """cls where texts begin with such a token; else mean, and says so."""
    if tokenizer.cls_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.cls_token_id:
        return "cls"
    say("note: texts have no CLS token in front: the baseline takes the mean over the tokens")
    return "mean"


def fit_map(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray], num_classes: int, class_weights: str
) -> tuple[np.ndarray, np.ndarray, float]:
    """(weight [classes, width], bias [classes], C): the SVC as one linear map of the embedding, scaled so that its
    softmax is calibrated on validation."""
    classifier, best_c = fit(features, labels, class_weights)
    weight, bias = linear_map(classifier, num_classes)
    classes = np.unique(labels["train"])  # a class without a training row has no scores to scale
    known = np.isin(labels["validation"], classes)
    if not known.all():
        say(f"note: {np.count_nonzero(~known)} validation rows are of classes that --limit left without a training row")
    margins = (features["validation"] @ weight.T + bias)[known][:, classes]
    scale = fit_scale(margins, np.searchsorted(classes, labels["validation"][known]))
    return weight * scale, bias * scale, best_c


def fit(
    features: dict[str, np.ndarray], labels: dict[str, np.ndarray], class_weights: str = "none"
) -> tuple[Pipeline, float]:
    """The LinearSVC, on standardised features, whose C is the most accurate on validation (the smallest of equals)."""
    weights = None if class_weights == "none" else class_weights
    scaler = StandardScaler().fit(features["train"])
    scaled = {name: scaler.transform(features[name]) for name in ("train", "validation")}

    tried = []
    for c in C_GRID:  # one after the other: in threads they wait for memory (8.3 s of two processors, 4.4 s either way)
        # The primal solver draws no random numbers.
        svc = LinearSVC(C=c, dual=False, class_weight=weights).fit(scaled["train"], labels["train"])
        tried.append((svc.score(scaled["validation"], labels["validation"]), -c, svc))
        say(f"C {c:<7g} validation accuracy {tried[-1][0]:.4f}")
    _, minus_c, best = max(tried, key=lambda one: one[:2])
    return make_pipeline(scaler, best), -minus_c


def fit_scale(margins: np.ndarray, labels: np.ndarray) -> float:
    """The factor under which softmax(factor * margins) has the least cross-entropy on these rows (validation).

    An SVC has no probabilities; one number, fitted where C was, gives some and cannot change a decision. The targets
    are Platt's (1999): a row of n of its class counts as n + 1 of n + classes, else rows without a mistake would want
    certainty.
    """
    rows, classes = np.arange(len(labels)), margins.shape[1]
    others = 1 / (np.bincount(labels, minlength=classes)[labels] + classes)  # [n]: what each of the others gets
    targets = np.repeat(others[:, None], classes, axis=1)
    targets[rows, labels] = 1 - (classes - 1) * others

    def loss(log_factor: float) -> float:
        return -(targets * log_softmax(np.exp(log_factor) * margins, axis=1)).sum(axis=1).mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def linear_map(classifier: Pipeline, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(weight [classes, width], bias [classes]) of one linear map of the raw embedding: a score a class, the largest
    of which is the SVC's decision. A class without a training row gets a score that never is."""
    scaler, svc = classifier[0], classifier[1]
    weight = svc.coef_ / scaler.scale_
    bias = svc.intercept_ - weight @ scaler.mean_
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    all_weights, all_biases = np.zeros((num_classes, weight.shape[1])), np.full(num_classes, -1e6)
    all_weights[svc.classes_], all_biases[svc.classes_] = weight, bias
    return all_weights, all_biases
