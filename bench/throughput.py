"""Training throughput beside what users would run instead: `python bench/throughput.py [--dataset D] [--rounds 5]`.

Contestants train on the same rows for the same number of steps, in turn, round after round in one process, so that
whatever else the machine does falls on all of them; the first round warms up and is not counted. Reported are medians.
The peers are the Hugging Face Trainer as most tutorials write it (batch 16, fp32, no sorting) and at its best (batches
of like length, bf16 where the device has it: where it has not, bf16 is eight times slower than fp32).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as main.py does; for all contestants
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100000")  # one contestant's shapes must not evict another's

import hub

hub.go_offline_if_unreachable()

import datasets
import matplotlib
import torch
from accelerate.state import AcceleratorState
from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

import device
import models
import runs
import train
from config import TrainConfig
from tracking import NullLogger

Contestant = Callable[[], float]  # trains over the rows once, returns seconds
BEST = "Trainer best (by length)"


def trainer(job: runs.Job, *, best: bool, lora: bool = False) -> Contestant:
    """The Hugging Face Trainer on the same rows."""
    model = models.load_classifier(job.source, job.data.label_names)
    if lora:
        model = models.add_lora(model, 16, 32, 0.1)
    split = job.splits["train"]
    ids = [split.ids[at : at + length] for at, length in zip(split.starts, split.lengths)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": split.labels})

    def run() -> float:
        AcceleratorState._reset_state(reset_partial_state=True)
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=16,
            num_train_epochs=1,
            learning_rate=2e-5,
            weight_decay=0.01,
            bf16=best and job.precision == "bf16",
            train_sampling_strategy="group_by_length" if best else "random",
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        peer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(job.tokenizer))
        peer.remove_callback(PrinterCallback)
        return float(peer.train().metrics["train_runtime"])

    return run


def _own_accelerator(config: TrainConfig) -> None:
    """TrainingArguments and Trainer replace accelerate's state, which every Accelerator shares: take it back."""
    AcceleratorState._reset_state(reset_partial_state=True)
    device.open_device(config.device, config.precision)


def ours(job: runs.Job, **flags: object) -> Contestant:
    """This project's loop with `flags` set; seconds of its training steps, the filling of a prefix cache left out."""
    _own_accelerator(job.config)
    config = TrainConfig(**{"epochs": 1, "precision": job.precision, **flags})
    job = runs.Job(**{**vars(job), "config": config, "precision": config.precision})
    job = runs.Job(**{**vars(job), "model": models.load_classifier(job.source, job.data.label_names)})
    record = {"model": {"fingerprint": models.encoder_fingerprint(job.model)}}
    engine, loader, _ = train.set_up(job, record)
    splits = train.cache_prefix(job, engine, record, train.Progress())
    rows = splits["validation"]  # the loop validates after an epoch; its time is not counted, so: as few as can be
    few = {**splits, "validation": replace(rows, lengths=rows.lengths[:64], labels=rows.labels[:64])}

    def run() -> float:
        _own_accelerator(job.config)
        progress = train.Progress(window_loss=torch.zeros((), device=job.accelerator.device))
        schedule = train.linear_schedule(engine.optimizer, 0.1, record["steps"])
        train.train(
            engine,
            schedule,
            loader,
            few,
            job.accelerator,
            NullLogger(),
            progress,
            epochs=1,
            steps_per_epoch=record["steps"],
        )
        return progress.train_seconds

    return run


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of several matrix products of 1024 to 4096, PyTorch's."""
    best, dtype = 0.0, torch.bfloat16 if precision == "bf16" else torch.float32
    for size in (1024, 2048, 4096):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(6):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def flops_per_token(model: torch.nn.Module) -> float:
    """6 x the weights of the encoder's matrices but the embeddings: forward, and backward twice."""
    blocks = models.encoder_blocks(model)[1]
    return 6.0 * sum(p.numel() for p in blocks.parameters() if p.ndim == 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default=None)
    parser.add_argument("--model", default=None)
    parser.add_argument("--rows", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of contestants")
    args = parser.parse_args()
    config = TrainConfig(dataset=args.dataset, model=args.model, limit=args.rows)
    job = runs.prepare(config, models.find_model(config.model))
    makers: dict[str, Callable[[], Contestant]] = {
        "Trainer fp32": lambda: trainer(job, best=False),
        BEST: lambda: trainer(job, best=True),
        "Trainer best, LoRA r16": lambda: trainer(job, best=True, lora=True),
        "ours, --plain": lambda: ours(job, plain=True),
        "ours, full": lambda: ours(job),
        "ours, LoRA r16": lambda: ours(job, peft=True),
        "ours, LoRA r16, last 2 layers": lambda: ours(job, peft=True, lora_layers=2),
        "ours, LoRA r16, last layer": lambda: ours(job, peft=True, lora_layers=1),
    }
    contestants = {name: make() for name, make in makers.items() if not args.only or name in args.only}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(args.rounds + 1):
        for name, run in contestants.items():
            taken = run()
            if number:
                seconds[name].append(taken)
            print(f"round {number}: {name}: {args.rows / taken:.0f} samples/s", file=sys.stderr, flush=True)
    _own_accelerator(config)
    report(job, args, seconds)


def report(job: runs.Job, args: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    rates = {name: args.rows / statistics.median(taken) for name, taken in seconds.items()}
    where = f"{device.device_name(job.accelerator.device)}, {job.precision}"
    peak = matmul_peak(job.accelerator.device, job.precision)
    tokens = float(job.splits["train"].lengths.mean())
    lines = [
        f"{where}, {job.source.name}, {job.data.name}, "
        f"{args.rows} rows of {tokens:.1f} tokens, batch 16, medians of {args.rounds} interleaved rounds; "
        f"{job.precision} matrix products peak at {peak / 1e9:.0f} GFLOP/s.",
        "",
        "| contestant | samples/s (min-max) | x Trainer fp32 | x Trainer best | share of peak |",
        "|---|---|---|---|---|",
    ]
    for name, rate in rates.items():
        low, high = args.rows / max(seconds[name]), args.rows / min(seconds[name])
        ratios = [f"{rate / rates[peer]:.2f}" if peer in rates else "-" for peer in ("Trainer fp32", BEST)]
        share = f"{rate * tokens * flops_per_token(job.model) / peak:.0%}" if "LoRA" not in name else "-"
        lines.append(f"| {name} | {rate:.0f} ({low:.0f}-{high:.0f}) | {' | '.join(ratios)} | {share} |")
    print("\n".join(lines))
    draw(rates, Path(__file__).parent / "throughput.png", where)


def draw(rates: dict[str, float], path: Path, where: str) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rates) + 1.2), dpi=150, layout="constrained")
    names = list(rates)[::-1]
    colors = ["#0072B2" if name.startswith("ours") else "0.65" for name in names]
    bars = axes.barh(names, [rates[name] for name in names], color=colors)
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set(xlabel="training samples per second", title=f"batch 16, {where}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
