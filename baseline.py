"""The linear baseline: LinearSVC on frozen CLS embeddings, with the records of a fine-tuned run."""

import hashlib
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import nn
from tqdm.auto import tqdm

import models
import packaged
import runs
from config import TrainConfig
from data import TokenSplit, sorted_batches
from metrics import score_with_intervals

C_GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
BATCH_SIZE = 64


def run_baseline(config: TrainConfig, source: models.ModelSource) -> Path:
    """Embed, choose C on validation, score test once. Returns the run folder."""
    job = runs.prepare(config, source)
    record = runs.describe(job)
    runs.announce(job, record)
    memory, started = runs.PeakMemory(job.accelerator.device), time.perf_counter()
    features, labels = {}, {name: split.labels for name, split in job.splits.items()}
    for name in job.splits:
        content = f"{job.splits[name].key}|{record['model']['fingerprint']}|{runs.arithmetic(job)}"
        features[name] = cached_embeddings(job, name, content)
    classifier, best_c = fit(features, labels, config.seed)
    weight, bias = linear_map(classifier, job.data.num_classes)
    scale = fit_scale(features["validation"] @ weight.T + bias, labels["validation"])
    weight, bias = weight * scale, bias * scale
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
        models.save_model(job.model.base_model, job.tokenizer, run_dir / "model", runs.model_card(record, scores))
        save_file({"weight": weight, "bias": bias}, run_dir / "model" / "linear.safetensors")
        runs.write_outcome(job, run_dir, {**record, **scores}, probabilities["test"])
    return run_dir


def cached_embeddings(job: runs.Job, name: str, content: str) -> np.ndarray:
    """`cls_embeddings` of a split, kept in the cache under the hash of what they were made from."""
    file = packaged.cache_dir() / "embeddings" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npy"
    if file.exists():
        return np.load(file, mmap_mode="r")
    found = cls_embeddings(job.model.base_model, job.splits[name], job.accelerator.device, job.precision, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}.npy")
    np.save(scratch, found)
    scratch.replace(file)
    return found


@torch.inference_mode()
def cls_embeddings(
    encoder: nn.Module, split: TokenSplit, device: torch.device, precision: str, name: str = ""
) -> np.ndarray:
    """[n, width] fp32: hidden state 0 of the last layer for every row of `split`, in the order of the rows."""
    encoder = encoder.to(device).eval()
    found = np.empty((len(split), encoder.config.hidden_size), np.float32)
    bar = tqdm(total=len(split), desc=f"embedding {name}", unit="row", disable=not sys.stderr.isatty())
    for indices in sorted_batches(split.lengths, BATCH_SIZE):
        batch = split.batch(indices)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            hidden = encoder(batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device))
        found[indices] = hidden.last_hidden_state[:, 0].float().cpu().numpy()
        bar.update(len(indices))
    bar.close()
    return found


def fit(features: dict[str, np.ndarray], labels: dict[str, np.ndarray], seed: int) -> tuple[Pipeline, float]:
    """The LinearSVC, on standardised features, whose C is the most accurate on validation (the smallest of equals)."""
    scaler = StandardScaler().fit(features["train"])
    scaled = {name: scaler.transform(features[name]) for name in ("train", "validation")}

    def accuracy(c: float) -> tuple[float, float, LinearSVC]:
        # The primal solver draws no random numbers; the dual one shares its generator between threads.
        svc = LinearSVC(C=c, dual=False, random_state=seed).fit(scaled["train"], labels["train"])
        return svc.score(scaled["validation"], labels["validation"]), -c, svc

    with ThreadPoolExecutor() as pool:  # liblinear computes without Python's lock
        tried = list(pool.map(accuracy, C_GRID))
    for validation_accuracy, minus_c, _ in tried:
        print(f"C {-minus_c:<7g} validation accuracy {validation_accuracy:.4f}", file=sys.stderr)
    _, minus_c, best = max(tried, key=lambda one: one[:2])
    return make_pipeline(scaler, best), -minus_c


def fit_scale(margins: np.ndarray, labels: np.ndarray) -> float:
    """The factor under which softmax(factor * margins) has the least cross-entropy on these rows (validation).

    An SVC has no probabilities; one number, fitted where C was, gives some and cannot change a decision.
    """
    rows = np.arange(len(labels))

    def loss(log_factor: float) -> float:
        return -log_softmax(np.exp(log_factor) * margins, axis=1)[rows, labels].mean()

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
