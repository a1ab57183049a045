"""Fine-tuning: one loop for full fine-tuning and LoRA, evaluation, and what a finished run leaves behind."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm.auto import tqdm

import models
import runs
from config import TrainConfig
from data import Batch, TokenSplit, epoch_steps, sorted_batches
from metrics import score, score_with_intervals
from tracking import Logger, NullLogger, open_logger

EVAL_BATCH_SIZE = 64
LOG_EVERY = 10  # optimiser steps

Forward = Callable[[Batch], torch.Tensor]  # a batch on the device -> logits [B, classes] in fp32


@dataclass
class Progress:
    """Where training stands: all that the loop carries from one step to the next beside weights and optimiser."""

    global_step: int = 0
    train_seconds: float = 0.0
    best_accuracy: float = -math.inf
    best_epoch: int = 0
    best_state: dict[str, torch.Tensor] = field(default_factory=dict)


def finetune(config: TrainConfig, source: models.ModelSource) -> Path:
    """Train, keep the best epoch by validation accuracy, score test once. Returns the run folder."""
    job = runs.prepare(config, source)
    accelerator, model = job.accelerator, job.model
    record = runs.describe(job)  # before LoRA renames the encoder's weights
    if config.peft:
        model = models.add_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout)
    trainable, total = models.count_parameters(model)
    record |= {"trainable_parameters": trainable, "total_parameters": total}
    run_dir, logger = _open_run(job, record)
    status = "failed"
    try:
        accelerator.print(f"trains {trainable:,} of {total:,} parameters ({trainable / total:.1%})", file=sys.stderr)
        model.to(accelerator.device)
        optimizer = make_optimizer(model, config.lr, config.weight_decay)
        rows = job.splits["train"]
        loader = partial(epoch_steps, rows.lengths, config.batch_size, config.gradient_accumulation_steps, config.seed)
        steps = sum(1 for _ in loader(0))
        warmup = int(config.warmup_ratio * config.epochs * steps)
        schedule = linear_schedule(optimizer, warmup, config.epochs * steps)
        ready = accelerator.prepare_model(model)
        forward = make_forward(ready, job.precision)
        memory, progress = runs.PeakMemory(accelerator.device), Progress()
        train(
            ready,
            forward,
            optimizer,
            schedule,
            loader,
            job.splits,
            accelerator,
            logger,
            progress,
            epochs=config.epochs,
            steps_per_epoch=steps,
            max_grad_norm=config.max_grad_norm,
        )
        record |= {
            "best_epoch": progress.best_epoch,
            "steps": progress.global_step,
            "train_seconds": progress.train_seconds,
            "samples_per_second": config.epochs * len(rows) / progress.train_seconds,
            "memory_before_training_bytes": memory.start,
            "peak_memory_bytes": memory.peak(),
        }
        models.load_trained_state(model, progress.best_state)
        finish(job, model, forward, run_dir, logger, record)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        logger.close(status)
    return run_dir


def _open_run(job: runs.Job, record: dict[str, Any]) -> tuple[Path, Logger]:
    """The run folder, the same one in every process, and the logger, silent in all but the main one."""
    config = job.config
    folder = [runs.create_run_dir(config, job.data.name) if job.accelerator.is_main_process else None]
    run_dir = broadcast_object_list(folder)[0] if job.accelerator.num_processes > 1 else folder[0]
    if not job.accelerator.is_main_process:
        return run_dir, NullLogger()
    runs.write_json(run_dir / "config.json", record)
    logger = open_logger(run_dir, wandb=config.wandb, comet=config.comet, project=config.project, run_name=run_dir.name)
    logger.log_config(record)
    return run_dir, logger


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; no decay for one-dimensional parameters (biases and every layer norm, whatever its name)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=trained[0].device.type in ("cpu", "cuda"))


def linear_schedule(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate rises from 0 over `warmup` steps, then falls to 0 at `steps`.

    As transformers' get_linear_schedule_with_warmup, whose import costs seconds.
    """

    def factor(step: int) -> float:
        return step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_forward(model: nn.Module, precision: str) -> Forward:
    """The model as a function of a batch; matrix products in bf16 where `precision` says so, the rest in fp32."""

    def forward(batch: Batch) -> torch.Tensor:
        device = batch.input_ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float()

    return forward


def train(
    model: nn.Module,
    forward: Forward,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loader: Callable[[int], Iterator[list[np.ndarray]]],
    splits: dict[str, TokenSplit],
    accelerator: Accelerator,
    logger: Logger,
    progress: Progress,
    *,
    epochs: int,
    steps_per_epoch: int,
    max_grad_norm: float,
) -> None:
    """The training loop: `epochs` passes, validation after each; changes the weights and `progress` in place.

    `loader(epoch)` gives the row numbers of each step, one array a forward pass. The loss of a step is the mean
    over its examples, however they are spread over forward passes and processes.
    """
    bar = tqdm(total=epochs * steps_per_epoch, unit="step", disable=_quiet(accelerator))
    for epoch in range(epochs):
        model.train()
        window, started = Window(accelerator), time.perf_counter()
        for micro_batches in loader(epoch):
            examples = sum(map(len, micro_batches))
            for indices in micro_batches:
                batch, share = own_part(splits["train"], indices, accelerator)
                logits = forward(batch)  # [B, classes]
                loss_sum = share * F.cross_entropy(logits, batch.labels, reduction="sum")
                # DDP averages gradients over the processes; the mean over examples wants their sum.
                accelerator.backward(loss_sum * (accelerator.num_processes / examples))
                window.loss_sum += loss_sum.detach()
            if max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            learning_rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.global_step += 1
            window.examples += examples
            bar.update()
            if progress.global_step % LOG_EVERY == 0 or progress.global_step % steps_per_epoch == 0:
                values = {**window.flush(), "train/lr": learning_rate}
                logger.log(values, step=progress.global_step, epoch=progress.global_step / steps_per_epoch)
                bar.set_postfix(loss=f"{values['train/loss']:.3f}", rate=f"{values['train/samples_per_second']:.0f}/s")
        progress.train_seconds += time.perf_counter() - started
        validate(model, forward, splits["validation"], accelerator, logger, epoch + 1, progress)
    bar.close()


def _quiet(accelerator: Accelerator) -> bool:
    return not (accelerator.is_main_process and sys.stderr.isatty())


class Window:
    """Loss and rate since the last log line. The loss is summed on the device, read only for the log."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._restart()

    def _restart(self) -> None:
        self.loss_sum = torch.zeros((), device=self.accelerator.device)
        self.examples = 0
        self.started = time.perf_counter()

    def flush(self) -> dict[str, float]:
        loss = self.accelerator.reduce(self.loss_sum).item() / self.examples
        rate = self.examples / (time.perf_counter() - self.started)
        self._restart()
        return {"train/loss": loss, "train/samples_per_second": rate}


def own_part(split: TokenSplit, indices: np.ndarray, accelerator: Accelerator) -> tuple[Batch, float]:
    """This process's rows of a batch, on the device, and their weight.

    A process left without a row by a short last batch computes one with weight 0, since all must take part.
    """
    mine = indices[accelerator.process_index :: accelerator.num_processes]
    share = float(len(mine) > 0)
    return to_device(split.batch(mine if share else indices[:1]), accelerator.device), share


def to_device(batch: Batch, device: torch.device) -> Batch:
    return batch if device.type == "cpu" else Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))


def validate(
    model: nn.Module,
    forward: Forward,
    split: TokenSplit,
    accelerator: Accelerator,
    logger: Logger,
    epoch: int,
    progress: Progress,
) -> None:
    """Score the validation rows, log them, and keep the weights if no earlier epoch was as accurate."""
    model.eval()
    got = score(split.labels, predict_probabilities(forward, split, accelerator))
    logger.log({f"val/{name}": value for name, value in got.items()}, step=progress.global_step, epoch=epoch)
    if got["accuracy"] > progress.best_accuracy:
        progress.best_accuracy, progress.best_epoch = got["accuracy"], epoch
        progress.best_state = models.trained_state(accelerator.unwrap_model(model))


@torch.inference_mode()
def predict_probabilities(forward: Forward, split: TokenSplit, accelerator: Accelerator) -> np.ndarray:
    """[n, classes] float64, in the order of the rows. Each row is computed once, by one of the processes."""
    parts = []
    for number, indices in enumerate(sorted_batches(split.lengths, EVAL_BATCH_SIZE)):
        if number % accelerator.num_processes == accelerator.process_index:
            logits = forward(to_device(split.batch(indices), accelerator.device))
            parts.append((indices, logits.double().softmax(dim=-1).cpu().numpy()))
    if accelerator.num_processes > 1:
        parts = gather_object(parts)
    rows = np.concatenate([indices for indices, _ in parts])
    values = np.concatenate([probabilities for _, probabilities in parts])
    ordered = np.empty_like(values)
    ordered[rows] = values
    return ordered


def finish(
    job: runs.Job, model: nn.Module, forward: Forward, run_dir: Path, logger: Logger, record: dict[str, Any]
) -> None:
    """Score validation and test with the best weights, and write what a finished run leaves: result.json last."""
    from report import draw_curves  # here, since matplotlib takes a second to import

    model.eval()
    scores = {}
    for name, split in (("val", job.splits["validation"]), ("test", job.splits["test"])):
        probabilities = predict_probabilities(forward, split, job.accelerator)
        scores[name] = score_with_intervals(split.labels, probabilities)
    if job.accelerator.is_main_process:
        values = {f"test/{name}": value for name, value in scores["test"].items() if isinstance(value, float)}
        logger.log(values, step=record["steps"], epoch=record["best_epoch"])
        models.save_model(model, job.tokenizer, run_dir / "model", runs.model_card(record, scores))
        runs.write_outcome(job, run_dir, {**record, **scores}, probabilities)
        draw_curves(run_dir)
    job.accelerator.wait_for_everyone()
