"""Fine-tuning: one loop for full fine-tuning and LoRA, evaluation, and what a finished run leaves behind."""

import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

import models
import runs
from checkpoint import Checkpoints, GracefulStop, newest_whole
from config import TrainConfig, UserError, say
from data import Batch, TokenSplit, epoch_steps
from device import PeakMemory, main_process_first, wait_for_everyone
from engine import Engine, FastEngine, make_engine, predict_probabilities
from metrics import score, score_with_intervals
from packaged import flush
from prefix import with_prefix
from tape import Workspace
from tracking import Logger

LOG_EVERY = 10  # optimiser steps

Loader = Callable[[int], Iterator[list[np.ndarray]]]  # epoch -> the row numbers of each step, one array a pass


@dataclass
class Progress:
    """Where training stands: all that the loop carries from step to step beside weights and optimiser."""

    global_step: int = 0
    train_seconds: float = 0.0
    cache_seconds: float = 0.0  # of these, spent on the frozen layers' output (`cache_prefix`)
    best_accuracy: float = -math.inf
    best_loss: float = math.inf  # on validation, of the same epoch
    best_epoch: int = 0
    best_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    skipped_steps: int = 0
    checkpoint_seconds: float = 0.0
    devices: tuple[str, ...] = ()  # that it was on: a run may be resumed on another number of threads
    # Since the last log line. The losses are summed on the device and read only for the log.
    window_loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    window_examples: int = 0
    window_seconds: float = 0.0

    def count(self, loss_sum: torch.Tensor, examples: int, seconds: float, finite: bool) -> None:
        """One more step; the loss of one that was dropped is left out of the mean."""
        self.global_step += 1
        self.train_seconds += seconds
        self.window_seconds += seconds
        if finite:
            self.window_loss = self.window_loss + loss_sum
            self.window_examples += examples
        else:
            self.skipped_steps += 1

    def flush_window(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean loss and rate since the last call."""
        loss_sum = accelerator.reduce(self.window_loss).item()
        values = {"train/loss": loss_sum / self.window_examples} if self.window_examples else {}  # all steps skipped
        values["train/samples_per_second"] = self.window_examples / self.window_seconds
        self.window_loss = torch.zeros_like(self.window_loss)
        self.window_examples, self.window_seconds = 0, 0.0
        return values


def finetune(config: TrainConfig, source: models.ModelSource | None) -> Path:
    """Train, keep the best epoch by validation accuracy, then loss; score test once. Returns the run folder."""
    if config.resume:
        asked, config = config, runs.find_resumable(config)
        if config is None:
            return runs.share_again(asked)
    job = runs.prepare(config, source)
    record = runs.describe(job)  # before LoRA renames the encoder's weights
    engine, loader, schedule = set_up(job, record)
    progress, metrics_bytes = starting_point(job, record, engine, schedule)
    with runs.open_run(job, record, metrics_bytes) as (run_dir, logger), GracefulStop(run_dir) as stop:
        runs.announce(job, record)
        checkpoints = Checkpoints(run_dir / "checkpoints", config.save_every, job.accelerator)
        taken = partial(snapshot, engine, schedule, progress, job.accelerator, run_dir)

        import sklearn.metrics  # noqa: F401 - here, since its code (27 MB) is no memory of training

        memory = PeakMemory(job.accelerator.device, engine.model)
        splits = cache_prefix(job, engine, record, progress)
        stop.open_loop()
        train(
            engine,
            schedule,
            loader,
            splits,
            job.accelerator,
            logger,
            progress,
            epochs=config.epochs,
            steps_per_epoch=record["steps"] // config.epochs,
            on_nan=config.on_nan,
            class_weights=balanced_weights(job) if config.class_weights == "balanced" else None,
            after_step=lambda: save_where_due(checkpoints, stop, progress, taken),
        )
        stop.close_loop()
        record |= costs(progress, memory, config.epochs * len(splits["train"]))
        models.load_trained_state(engine.model, progress.best_weights)
        finish(job, engine, splits, run_dir, logger, record)
        checkpoints.clear()
    runs.conclude(job, run_dir)
    return run_dir


def starting_point(job: runs.Job, record: dict[str, Any], engine: Engine, schedule: LambdaLR) -> tuple[Progress, int]:
    """(progress, bytes of metrics.jsonl written by then): step 0, or the newest whole checkpoint of a resumed run."""
    progress, metrics_bytes = Progress(window_loss=torch.zeros((), device=job.accelerator.device)), 0
    if job.config.resume:
        run_dir = Path(job.config.resume)
        runs.check_same(record, run_dir)
        if changed := runs.began_with(record, run_dir):
            record["began_with"] = changed
            if job.accelerator.is_main_process:
                say(f"note: this run began with {', '.join(changed)}: perhaps not bit for bit what one version gives")
        if state := newest_whole(run_dir / "checkpoints"):
            metrics_bytes = restore(state, engine, schedule, progress, job.accelerator)
    note_device(progress, record, job.accelerator)
    return progress, metrics_bytes


def save_where_due(
    checkpoints: Checkpoints, stop: GracefulStop, progress: Progress, taken: Callable[[], dict[str, Any]]
) -> None:
    """Save a checkpoint if one is due or the run is to stop; in that case raise Interrupted."""
    step, asked = progress.global_step, stop.asked(checkpoints.accelerator)
    if asked or checkpoints.due(step):
        started = time.perf_counter()
        checkpoints.save(step, taken())
        progress.checkpoint_seconds += time.perf_counter() - started
    if asked:
        raise stop.interrupted(asked, f"at step {step}")


def costs(progress: Progress, memory: PeakMemory, samples: int) -> dict[str, Any]:
    """What result.json says of the training of `samples` rows, those of every epoch counted."""
    return {
        "best_epoch": progress.best_epoch,
        "train_seconds": progress.train_seconds,
        "cache_seconds": progress.cache_seconds,
        "samples_per_second": samples / progress.train_seconds,
        "memory_before_training_bytes": memory.start,
        "peak_memory_bytes": memory.peak(),
        "skipped_steps": progress.skipped_steps,
        "checkpoint_seconds": progress.checkpoint_seconds,
    }


def set_up(job: runs.Job, record: dict[str, Any]) -> tuple[Engine, Loader, LambdaLR]:
    """(engine, loader, schedule) for the model, which gets its adapters first with --peft. Their sizes, name and number
    of steps go to `record`."""
    config, model, accelerator = job.config, job.model, job.accelerator
    if config.peft:
        model = models.add_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_layers)
    trainable, total = models.count_parameters(model)
    model = model.to(accelerator.device)
    settings = {
        "precision": job.precision,
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "frozen_prefix": len(models.encoder_blocks(job.model)[1]) - config.lora_layers if config.lora_layers else 0,
    }
    if job.sharded:
        from sharded import ShardedEngine  # here, since it is seldom needed and takes a while to import

        engine: Engine = ShardedEngine(model, accelerator, **settings)
    else:
        engine = make_engine(model, accelerator, plain=config.plain, **settings)
    lengths = job.splits["train"].lengths
    loader = partial(epoch_steps, lengths, config.batch_size, config.gradient_accumulation_steps, config.seed)
    steps = config.epochs * sum(1 for _ in loader(0))
    gc.freeze()  # what was imported stays: the collector need not look at it again and again (2% of a step)
    name = engine.name + ("" if accelerator.device.type == "cpu" else f", {accelerator.device.type}")
    record |= {"trainable_parameters": trainable, "total_parameters": total, "engine": name, "steps": steps}
    return engine, loader, linear_schedule(engine.optimizer, config.warmup_ratio, steps)


def note_device(progress: Progress, record: dict[str, Any], accelerator: Accelerator) -> None:
    """If a run is resumed on another device, or with another number of threads, say so, on stderr and in the record:
    its sums were rounded in another order, and its times describe no single device."""
    progress.devices = tuple(dict.fromkeys((*progress.devices, record["device"])))
    record["device"] = ", then ".join(progress.devices)
    if len(progress.devices) > 1 and accelerator.is_main_process:
        say(f"note: this run was on {record['device']}: not bit for bit what one of them would give")


def cache_prefix(job: runs.Job, engine: Engine, record: dict[str, Any], progress: Progress) -> dict[str, TokenSplit]:
    """The splits, with the frozen layers' output beside them if there is a frozen prefix. Filling the cache counts as
    training."""
    if not isinstance(engine, FastEngine) or not engine.frozen_prefix:
        return job.splits
    started = time.perf_counter()
    content = f"{record['model']['fingerprint']}|{job.cache_key}|{engine.frozen_prefix}"
    with main_process_first(job.accelerator):
        splits = with_prefix(
            job.splits,
            partial(engine.classifier.prefix, space=Workspace()),
            content,
            job.model.config.hidden_size,
            engine.classifier.dtype,
            job.accelerator.device,
        )
    if progress.global_step == 0:
        progress.cache_seconds = time.perf_counter() - started
        progress.train_seconds += progress.cache_seconds
    return splits


def snapshot(
    engine: Engine, schedule: LambdaLR, progress: Progress, accelerator: Accelerator, run_dir: Path
) -> dict[str, Any]:
    """All that a later process needs to go on as if nothing had happened."""
    metrics = run_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        flush(metrics)  # else a power cut could leave less of it than the checkpoint counts on
    own = {"cpu": torch.get_rng_state(), "window_loss": progress.window_loss.cpu()}  # each process has its own
    if accelerator.device.type != "cpu":
        own["device"] = torch.get_device_module(accelerator.device).get_rng_state()
    return {
        "weights": {n: models.full_tensor(p.detach()) for n, p in engine.model.named_parameters() if p.requires_grad},
        "optimizer": engine.optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "progress": {name: value for name, value in vars(progress).items() if name != "window_loss"},
        "processes": gather_object([own]) if accelerator.num_processes > 1 else [own],
        "metrics_bytes": metrics.stat().st_size if accelerator.is_main_process else 0,
    }


def restore(
    state: dict[str, Any], engine: Engine, schedule: LambdaLR, progress: Progress, accelerator: Accelerator
) -> int:
    """Put back what `snapshot` took. Returns the bytes of metrics.jsonl that were written by then."""
    models.load_trained_state(engine.model, state["weights"])
    engine.optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    # A checkpoint from before losses broke ties keeps its earliest epoch.
    for name, value in {"best_loss": -math.inf, **state["progress"]}.items():
        setattr(progress, name, value)
    own = state["processes"][accelerator.process_index]
    progress.window_loss = own["window_loss"].to(accelerator.device)
    torch.set_rng_state(own["cpu"])
    if accelerator.device.type != "cpu":
        torch.get_device_module(accelerator.device).set_rng_state(own["device"])
    if accelerator.is_main_process:
        say(f"resuming at step {progress.global_step}")
    return state["metrics_bytes"]


def linear_schedule(optimizer: torch.optim.Optimizer, warmup_ratio: float, steps: int) -> LambdaLR:
    """The rate rises from 0 over the first `warmup_ratio` of the steps, then falls to 0 at the last.

    As transformers' get_linear_schedule_with_warmup, whose import costs seconds.
    """
    warmup = int(warmup_ratio * steps)

    def factor(step: int) -> float:
        return step / warmup if step < warmup else (steps - step) / max(1, steps - warmup)

    return LambdaLR(optimizer, factor)


def train(
    engine: Engine,
    schedule: LambdaLR,
    loader: Loader,
    splits: dict[str, TokenSplit],
    accelerator: Accelerator,
    logger: Logger,
    progress: Progress,
    *,
    epochs: int,
    steps_per_epoch: int,
    on_nan: str = "stop",
    class_weights: torch.Tensor | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """The training loop: `epochs` passes, validation after each; goes on from where `progress` stands.

    The loss of a step is the mean over its examples, however they are spread over forward passes and processes.
    """
    quiet = not (accelerator.is_main_process and sys.stderr.isatty())
    with tqdm(total=epochs * steps_per_epoch, initial=progress.global_step, unit="step", disable=quiet) as bar:
        for epoch in range(progress.global_step // steps_per_epoch, epochs):
            engine.train_mode()
            rows = islice(loader(epoch), progress.global_step % steps_per_epoch, None)
            upcoming = load(splits["train"], next(rows, None), accelerator)
            while upcoming is not None:
                started = time.perf_counter()
                micro_batches, parts = upcoming
                examples, step_loss = sum(map(len, micro_batches)), torch.zeros_like(progress.window_loss)
                for batch, weight in parts:
                    logits = engine.forward(batch)  # [B, classes]
                    loss_sum = weight * F.cross_entropy(logits, batch.labels, class_weights, reduction="sum")
                    (loss_sum / examples).backward()
                    step_loss += loss_sum.detach()
                learning_rate = schedule.get_last_lr()[0]
                engine.step()
                schedule.step()
                # A GPU is still at this step: the next one's batches are made before `stepped` waits for it.
                upcoming = load(splits["train"], next(rows, None), accelerator)
                finite = engine.stepped()
                progress.count(step_loss, examples, time.perf_counter() - started, finite)
                bar.update()
                if not finite and on_nan == "stop":
                    bad = np.concatenate(micro_batches).tolist()
                    raise UserError(
                        f"the loss or its gradient is not finite at step {progress.global_step} (learning rate "
                        f"{learning_rate:g}, training rows {bad}); lower --lr, or give --on_nan skip"
                    )
                at_end = progress.global_step % steps_per_epoch == 0
                if progress.global_step % LOG_EVERY == 0 or at_end:
                    values = {**progress.flush_window(accelerator), "train/lr": learning_rate}
                    logger.log(values, step=progress.global_step, epoch=progress.global_step / steps_per_epoch)
                    bar.set_postfix(
                        loss=f"{values.get('train/loss', math.nan):z.3f}",
                        rate=f"{values['train/samples_per_second']:.0f}/s",
                    )
                if at_end:
                    validate(engine, splits["validation"], accelerator, logger, epoch + 1, progress)
                after_step()


def balanced_weights(job: runs.Job) -> torch.Tensor:
    """[classes]: rows / (classes * rows of the class) in train, so that their mean over the rows is 1."""
    counts = np.bincount(job.splits["train"].labels, minlength=job.data.num_classes)
    present = np.count_nonzero(counts)
    weights = counts.sum() / (present * np.maximum(counts, 1))
    return torch.tensor(weights, dtype=torch.float32, device=job.accelerator.device)


def load(
    split: TokenSplit, micro_batches: list[np.ndarray] | None, accelerator: Accelerator
) -> tuple[list[np.ndarray], Iterable[tuple[Batch, float]]] | None:
    """A step's micro-batches, and this process's share of each with its weight; None at the end of the epoch.

    For a GPU they are copied at once, while it works on the previous step. On the CPU each is made when it is asked
    for, since `HiddenStates.batch` overwrites the one before.
    """
    if micro_batches is None:
        return None
    parts = (own_part(split, indices, accelerator) for indices in micro_batches)
    return micro_batches, parts if accelerator.device.type == "cpu" else list(parts)


def own_part(split: TokenSplit, indices: np.ndarray, accelerator: Accelerator) -> tuple[Batch, float]:
    """This process's share of a batch, on the device, and its weight in the loss.

    A process that a short batch leaves without a row computes one with weight 0, since all must take part.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    size = -(-len(indices) // world)
    start, stop = min(rank * size, len(indices)), min((rank + 1) * size, len(indices))
    if start == stop:
        return split.batch(indices, 0, 1).to(accelerator.device), 0.0
    return split.batch(indices, start, stop).to(accelerator.device), 1.0


def validate(
    engine: Engine, split: TokenSplit, accelerator: Accelerator, logger: Logger, epoch: int, progress: Progress
) -> None:
    """Score the validation rows, log them, and keep the weights if no earlier epoch was as accurate, or an equally
    accurate one had a higher loss: few rows tie often, and the first of equals has hardly learned."""
    got = score(split.labels, predict_probabilities(engine, split, accelerator))
    logger.log({f"val/{name}": value for name, value in got.items()}, step=progress.global_step, epoch=epoch)
    if (got["accuracy"], -got["loss"]) > (progress.best_accuracy, -progress.best_loss):
        progress.best_accuracy, progress.best_loss, progress.best_epoch = got["accuracy"], got["loss"], epoch
        progress.best_weights = models.trained_state(engine.model)


def finish(
    job: runs.Job,
    engine: Engine,
    splits: dict[str, TokenSplit],
    run_dir: Path,
    logger: Logger,
    record: dict[str, Any],
) -> None:
    """Score validation and test with the best weights, and write what a finished run leaves: result.json last."""
    found, scores = {}, {}
    for name, split in (("val", splits["validation"]), ("test", splits["test"])):
        found[name] = predict_probabilities(engine, split, job.accelerator)
        scores[name] = score_with_intervals(split.labels, found[name])
    model = engine.model_to_save()
    if job.accelerator.is_main_process:
        values = {f"test/{name}": value for name, value in scores["test"].items() if isinstance(value, float)}
        logger.log(values, step=record["steps"], epoch=job.config.epochs)
        with models.writing(run_dir):
            models.save_model(model, job.tokenizer, run_dir / "model", models.model_card(record, scores))
            runs.write_outcome(job, run_dir, {**record, **scores}, found["test"])
        runs.warn_of_one_answer(splits["validation"].labels, found["val"], job.data.label_names)
    wait_for_everyone(job.accelerator)
