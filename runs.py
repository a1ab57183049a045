"""What every run does before and after its own work: find model and data, make the run folder, write its records.

The records in the run folder are the truth; reports, pictures and both trackers are made from them.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from torch import nn

import hub
import models
import packaged
from config import NEWEST, TrainConfig, UserError, say
from data import TextData, TokenSplit, load_data
from device import arithmetic, code_hash, device_name, main_process_first, open_device, take_fsdp
from readers import Columns, brief
from tokens import Cutter, tokenize
from tracking import Logger, NullLogger, open_logger, read_json

PACKAGES = ("torch", "transformers", "datasets", "peft", "accelerate", "scikit-learn", "tokenizers", "numpy")
FEW_ROWS = 30  # of validation: one row more or less right is 3 points


@dataclass(frozen=True)
class Job:
    """What a run works on."""

    config: TrainConfig
    accelerator: Accelerator
    sharded: bool  # FSDP
    precision: str  # "fp32" or "bf16"
    source: models.ModelSource
    tokenizer: Any
    max_length: int
    data: TextData
    splits: dict[str, TokenSplit]
    model: nn.Module

    @property
    def cache_key(self) -> str:
        """What, beside its weights and its input, decides what the encoder gives: for the keys of caches."""
        aside = {"_name_or_path", "transformers_version", "architectures", "id2label", "label2id", "dtype"}
        config = {key: value for key, value in self.source.config.to_dict().items() if key not in aside}
        text = json.dumps(config, sort_keys=True, default=str)
        return f"{arithmetic(self.accelerator.device, self.precision)}|{code_hash()}|{text}"


def prepare(config: TrainConfig, source: models.ModelSource | None) -> Job:
    """Load everything the run needs. Nothing is written but caches, and nothing is said but what is wrong.

    source: None for a resumed run, which goes on with what it began on.
    """
    _check_writable("--resume" if config.resume else "--output_dir", config.resume or config.output_dir)
    if source is None:
        packaged_one = _began_packaged(config, "model")
        source = models.packaged_model() if packaged_one else models.find_model(config.model)
    tokenizer, max_length = models.load_tokenizer(source, config.max_length)
    sharded = take_fsdp()
    accelerator, precision = open_device(config.device, config.precision)
    with main_process_first(accelerator):
        columns = Columns(config.text_column, config.label_column)
        here = config.dataset, config.dataset_dir, config.limit, config.seed
        data = load_data(*here, columns, _began_packaged(config, "data"))
        splits, cut = tokenize(data, Cutter(tokenizer, max_length, config.truncation))
        data = replace(data, notes=(*data.notes, *cut))
    torch.manual_seed(config.seed)  # decides the new head, the adapters, and every dropout from here on
    model = models.load_classifier(source, data.label_names)
    mine = source.name, data.fingerprints, precision  # each process has looked for itself
    if accelerator.num_processes > 1 and any(other != mine for other in gather_object([mine])):
        raise UserError(f"the processes found different models or data; this one {source.name} and {data.source}")
    sharded = sharded and accelerator.num_processes > 1
    return Job(config, accelerator, sharded, precision, source, tokenizer, max_length, data, splits, model)


def announce(job: Job, record: dict[str, Any]) -> None:
    """Say what the run works on, once nothing can be wrong with it any more."""
    if not job.accelerator.is_main_process:
        return
    data = job.data
    if data.kind == "packaged":
        say("*** These reviews are near the hub's rotten_tomatoes, not the same rows: do not compare across. ***")
    rows = " / ".join(f"{len(split):,}" for split in data.splits.values())
    say(f"model  {job.source.name}\ndata   {data.name}: {rows} rows (train / validation / test)")
    say(f"       classes: {', '.join(data.label_names)}\ndevice {job.accelerator.device}, {job.precision}")
    for note in data.notes:
        say(note if note.startswith("warning: ") else f"note: {note}")
    if (few := len(data.splits["validation"])) < FEW_ROWS:
        say(f"warning: validation has {few} rows: too few to choose well by")
    if trained := record.get("trainable_parameters"):
        total = record["total_parameters"]
        say(f"trains {trained:,} of {total:,} parameters ({trained / total:.1%})")


def _check_writable(flag: str, folder: str) -> None:
    """UserError for a folder that cannot be made or written: now, not after minutes of reading."""
    wanted = Path(folder).absolute()
    there = next(path for path in (wanted, *wanted.parents) if os.path.exists(path))  # noqa: PTH110 - never raises
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        fault = "is not a folder" if not there.is_dir() else "cannot be written"
        raise UserError(f"{flag} {folder}: expected a folder that can be written, but {there} {fault}")


@contextlib.contextmanager
def open_run(job: Job, record: dict[str, Any], metrics_bytes: int = 0) -> Iterator[tuple[Path, Logger]]:
    """The run's folder, the same one in every process, and its logger, silent in all but the main one.

    A resumed run keeps `metrics_bytes` of its metrics.jsonl: the lines behind its checkpoint are written again.
    The logger is closed however the block ends, and told how.
    """
    config, accelerator = job.config, job.accelerator
    if config.resume:
        run_dir = Path(config.resume)
    else:
        folder = [create_run_dir(config, job.data.name) if accelerator.is_main_process else None]
        run_dir = (broadcast_object_list(folder) if accelerator.num_processes > 1 else folder)[0]
    logger: Logger = NullLogger()
    if accelerator.is_main_process:
        lock = FileLock(run_dir / ".lock", blocking=False)  # the system lets go of it when the process is killed
        _take(lock, run_dir, record, metrics_bytes, new=not config.resume)
        logger = open_logger(
            run_dir,
            wandb=config.wandb,
            comet=config.comet,
            project=config.project,
            run_name=run_dir.name,
            resume=bool(config.resume),
        )
        logger.log_config(record)
    status = "failed"
    try:
        yield run_dir, logger
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # wait no longer: how the block ended counts
            logger.close(status)
        if accelerator.is_main_process:
            (run_dir / ".lock").unlink(missing_ok=True)
            lock.release()


def _take(lock: FileLock, run_dir: Path, record: dict[str, Any], metrics_bytes: int, new: bool) -> None:
    """Make the folder this process's own: a new one gets its record, another is cut back to its checkpoint.

    UserError where another process is still at work in it or has finished it, or where it cannot be written.
    """
    try:
        lock.acquire()
        finished = (run_dir / "result.json").exists()  # since this process looked for a run to go on with
        if new:
            write_json(run_dir / "config.json", record)
        elif not finished and (run_dir / "metrics.jsonl").exists():
            size = (run_dir / "metrics.jsonl").stat().st_size
            os.truncate(run_dir / "metrics.jsonl", min(size, metrics_bytes))
    except Timeout:
        raise UserError(f"--resume {run_dir}: another process is still at work on this run") from None
    except (OSError, UserError) as error:
        if new:
            shutil.rmtree(run_dir, ignore_errors=True)
        named = "--output_dir" if new else "--resume"
        raise UserError(f"{named} {run_dir}: cannot be written: {error}") from error
    if finished:
        raise UserError(f"--resume {run_dir}: another process has just finished this run")


def find_resumable(config: TrainConfig) -> TrainConfig | None:
    """`config` with the run to go on with in `resume`; None if that run is finished.

    `--resume` alone means the newest unfinished run in output_dir of the same config. UserError if there is none.
    """
    if config.resume == NEWEST:
        wanted, defaults = _comparable(asdict(config)), asdict(TrainConfig())  # of flags that are newer than a run
        found = [
            path.parent
            for path in Path(config.output_dir).glob("*/config.json")
            if not (path.parent / "result.json").exists()
            and (stored := _stored_config(path))
            and _comparable({**defaults, **stored}) == wanted
        ]
        if not found:
            raise UserError(f"--resume: no unfinished run of this config in {config.output_dir}")
        config = replace(config, resume=str(max(found, key=lambda folder: (folder / "config.json").stat().st_mtime)))
    return None if (Path(config.resume) / "result.json").exists() else config


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _began_packaged(config: TrainConfig, what: str) -> bool:
    """Whether the run that is resumed began on the packaged "model" or "data": it goes on with it, though the hub
    answers now."""
    if not config.resume:
        return False
    stored = read_json(Path(config.resume) / "config.json")
    return isinstance(found := stored.get(what), dict) and found.get("kind") == "packaged"


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    aside = ("resume", "runs", "texts", "output_dir", "plots_dir")
    return {key: value for key, value in config.items() if key not in aside}


def check_same(record: dict[str, Any], run_dir: Path) -> None:
    """A run is continued on the model, the data and the number of processes that it began with, or not at all."""
    stored = read_json(run_dir / "config.json")
    for key in ("model", "data", "max_length", "precision", "processes", "engine"):
        if found := _difference(key, _without_origin(stored.get(key)), _without_origin(record[key])):
            raise UserError(f"--resume {run_dir}: its {found}")


def began_with(record: dict[str, Any], run_dir: Path) -> list[str]:
    """The code and the libraries that a resumed run began with, where they are others now: `torch 2.12.0`."""
    stored = read_json(run_dir / "config.json")
    if not isinstance(stored.get("versions"), dict):
        return []
    was, now = (
        {**one["versions"], "Python": one.get("python"), "this program at commit": one.get("git_commit")}
        for one in (stored, record)
    )
    return [f"{name} {was[name]}" for name in was if was[name] and was[name] != now.get(name)]


def _without_origin(value: Any) -> Any:
    """A record of a model or of data without where it came from: names and fingerprints decide whether it is the same,
    and a repository on the hub has another revision after every change of its card."""
    aside = ("source", "license", "notes", "text_column")
    return {k: v for k, v in value.items() if k not in aside} if isinstance(value, dict) else value


def _difference(name: str, was: Any, now: Any) -> str | None:
    """The first difference in words, None where there is none."""
    if isinstance(was, dict) and isinstance(now, dict):
        found = (_difference(f"{name} {key}", was.get(key), now.get(key)) for key in {**was, **now})
        return next((text for text in found if text), None)
    return None if was == now else f"{name} was {brief(was)}, now it is {brief(now)}"


def create_run_dir(config: TrainConfig, dataset: str) -> Path:
    """A new folder `<dataset>-<method>[-r<rank>][-<lr>]-seed<seed>[-N]` in `output_dir`; never one that exists."""
    dataset = dataset.removesuffix(" (packaged)").replace("/", "--")
    parts = [dataset, config.method]
    if config.peft:
        parts.append(f"r{config.lora_r}")
    if config.mode == "finetune":
        parts.append(f"{config.lr:g}".replace("e-0", "e-"))
    stem = "-".join([*parts, f"seed{config.seed}"])
    root = Path(config.output_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = root / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()  # fails if it exists, so two runs of the same second get two folders
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise UserError(f"--output_dir {root}: cannot be written: {error.strerror or error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write beside `path`, flush to the disk, rename: a reader sees the old file or the whole new one."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    scratch.replace(path)


def describe(job: Job) -> dict[str, Any]:
    """What config.json holds: the whole config, versions, git commit, and where model and data came from."""
    data, source = job.data, job.source
    return {
        "config": asdict(job.config),
        "method": job.config.method,
        "model": {
            "name": source.name,
            "kind": source.kind,
            "source": source.source,
            "license": source.license,
            "fingerprint": models.encoder_fingerprint(job.model),
        },
        "data": {
            "name": data.name,
            "kind": data.kind,
            "source": data.source,
            "labels": list(data.label_names),
            "text_column": data.text_column,
            "rows": {name: len(rows) for name, rows in data.splits.items()},
            "fingerprints": data.fingerprints,
            "notes": list(data.notes),
        },
        "max_length": job.max_length,
        "precision": job.precision,
        "device": device_name(job.accelerator.device),
        "processes": job.accelerator.num_processes,
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The tool's own commit, with a + if files were changed since; None where there is no git."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_outcome(job: Job, run_dir: Path, result: dict[str, Any], probabilities: np.ndarray) -> None:
    """predictions.jsonl (one test row a line), the picture, then result.json: it marks a finished run, whose files are
    on the disk."""
    names = job.data.label_names
    with (run_dir / "predictions.jsonl").open("w", encoding="utf-8") as file:
        texts, labels = job.data.splits["test"]["text"], job.splits["test"].labels
        for text, label, row in zip(texts, labels, probabilities, strict=True):
            prediction = {
                "text": text,
                "label": names[label],
                "prediction": names[row.argmax()],
                "probability": float(row.max()),
                "probabilities": dict(zip(names, map(float, row))),
            }
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
    if job.config.mode == "finetune":
        from plots import draw_curves  # here, since matplotlib takes a second to import

        draw_curves(run_dir, result["best_epoch"])
    for file in (run_dir / "predictions.jsonl", run_dir / "metrics.jsonl", *(run_dir / "model").iterdir()):
        packaged.flush(file)
    result["positive_class"] = models.positive_class(result["data"])
    write_json(run_dir / "result.json", result)


def conclude(job: Job, run_dir: Path) -> None:
    """Say what came out, and upload the model, with --push_to_hub. The run is finished by then: no closed output and no
    failed upload undoes it."""
    if job.accelerator.is_main_process:
        print(summary(read_json(run_dir / "result.json")))
        print(f"run folder: {run_dir}")
        if job.config.push_to_hub:
            hub.upload(run_dir / "model", job.config.push_to_hub)


def share_again(config: TrainConfig) -> Path:
    """For a finished run that is resumed: its upload may have failed, or been stopped. Returns its folder."""
    run_dir = Path(config.resume)
    if int(os.environ.get("RANK", "0")):  # of several processes one is enough
        return run_dir
    print(f"{run_dir} is finished already")
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)  # it may have been stopped before they were deleted
    if config.push_to_hub:
        hub.upload(run_dir / "model", config.push_to_hub)
    return run_dir


def warn_of_one_answer(labels: np.ndarray, probabilities: np.ndarray, names: tuple[str, ...]) -> None:
    """Say so where the model calls all validation rows the same, though they are not. probabilities: [n, classes]."""
    called = np.unique(probabilities.argmax(axis=1))
    if len(called) == 1 and len(np.unique(labels)) > 1:
        say(f"warning: the model calls every validation row {names[called[0]]!r}; try a lower --lr, or more --epochs")


def summary(result: dict[str, Any]) -> str:
    """The end of a run in a few lines, for a person."""
    lines = [f"{'':11}{'rows':>6}  {'loss':>6}  accuracy (95%)       precision  recall     f1  macro f1"]
    for split in ("val", "test"):
        got = result[split]
        low, high = got["accuracy_interval"]
        lines.append(
            f"{split:11}{got['rows']:6d}  {got['loss']:6.4f}  {got['accuracy']:.4f} ({low:.3f}-{high:.3f})"
            f"{got['precision']:11.4f}{got['recall']:9.4f}{got['f1']:9.4f}{got['macro_f1']:8.4f}"
        )
    about = result.get("positive_class")
    lines.append(f"precision, recall and f1: {f'of {about!r}' if about else 'means over the classes'}")
    lines += [note for note in result["data"]["notes"] if note.startswith("warning: ")]
    return "\n".join(lines)
