"""A finished run -> labels and probabilities of new texts, streamed; and a LoRA run -> plain weights."""

import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from scipy.special import softmax
from torch import Tensor, nn

import fast
import hub
import models
from config import TrainConfig, UserError, silence
from data import Batch, TokenSplit, sorted_batches
from device import open_device, tokens_at_once
from engine import plain_logits, state_reader
from progress import progress_bar
from streams import Answers, open_input, open_output
from tokens import Cutter

BATCH_SIZE = 64
# bf16 moves the difference of the two best logits a little (see bench/RESULTS.md): rows with a smaller one than
# this are computed again in fp32: no label depended on the precision where that was measured.
CLOSE = 0.25

Forward = Callable[[Batch], Tensor]  # a batch on the device -> logits [B, classes]


@dataclass(frozen=True)
class SavedRun:
    """What the records of a finished run say of its model."""

    path: Path
    flag: str  # the flag that named it, for messages
    record: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.path / "model"

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(self.record["data"]["labels"])

    def error(self, reason: object) -> UserError:
        return UserError(f"--{self.flag} {self.path}: {reason}")

    def load(self) -> tuple[Any, nn.Module]:
        """(tokenizer, model in fp32). UserError where they are damaged."""
        try:
            source = models.find_model(str(self.folder))
            tokenizer, _ = models.load_tokenizer(source, self.record["max_length"])
            return tokenizer, models.load_saved(source, self.label_names)
        except UserError as error:
            raise self.error(str(error).removeprefix("--model model: ")) from error


def open_saved(run: str, flag: str) -> SavedRun:
    """Raises UserError where `run` is not the folder of a finished run, with its model."""
    path = Path(run)
    try:
        saved = SavedRun(path, flag, json.loads((path / "config.json").read_text(encoding="utf-8")))
        if not (saved.label_names and saved.record["method"] and saved.record["config"]["precision"]):
            raise KeyError("method")
        if not isinstance(saved.record["max_length"], int):
            raise TypeError(f"max_length is {saved.record['max_length']!r}")
    except OSError as error:
        raise UserError(f"--{flag}: expected a run folder with its config.json, got {run!r}") from error
    except (ValueError, KeyError, TypeError) as error:
        if (path.resolve().parent / "result.json").exists():
            raise UserError(f"--{flag}: expected the run's folder, {path.resolve().parent}, got its {run!r}") from error
        raise UserError(f"--{flag}: {path / 'config.json'} is damaged ({type(error).__name__}: {error})") from error
    if not (path / "result.json").exists():
        raise saved.error(f"not finished; go on with it: python main.py --resume {shlex.quote(run)}")
    for name in ("config.json", "model.safetensors"):
        if not (saved.folder / name).is_file():
            raise saved.error(f"its model folder lacks {name}")
    return saved


class Predictor:
    """The model of a finished run: texts -> probabilities."""

    def __init__(self, saved: SavedRun, device: str, precision: str) -> None:
        self.saved = saved
        accelerator, self.precision = open_device(device, precision)
        self.device = accelerator.device
        tokenizer, model = saved.load()
        self.model = model.to(self.device).eval().requires_grad_(False)
        record = saved.record
        self.cutter = Cutter(tokenizer, record["max_length"], record["config"].get("truncation", "head"))
        self.read_weights()

    def read_weights(self) -> None:
        """Compute with the model's weights as they are now: each forward pass keeps a copy of its own."""
        self.forward = self._forward(self.precision)
        self.exact = self.forward if self.precision == "fp32" else self._forward("fp32")

    def _forward(self, precision: str) -> Forward:
        """How a batch is computed: a baseline by its linear map, the rest on the fast path where it can run it."""
        if self.saved.record["method"] == "baseline":
            return self._baseline(precision)
        if fast.supports(self.model) is None:
            classifier = fast.FastClassifier(self.model, precision)
            return lambda batch: classifier(batch.input_ids, batch.lengths)
        return lambda batch: plain_logits(self.model, batch, precision)

    def _baseline(self, precision: str) -> Forward:
        try:
            layer = load_file(self.saved.folder / "linear.safetensors")
            weight, bias = (torch.tensor(layer[name], dtype=torch.float64) for name in ("weight", "bias"))
        except Exception as error:  # safetensors raises its own kinds
            raise self.saved.error(f"its model/linear.safetensors cannot be read: {error}") from error
        read = state_reader(self.model, precision, self.saved.record.get("pooling", "cls"))
        return lambda batch: read(batch).cpu().double() @ weight.T + bias

    def __call__(self, texts: list[str]) -> np.ndarray:
        """[n, classes] float64, in the order of the texts. Rows that bf16 leaves open are computed in fp32."""
        ids, _ = self.cutter(texts)
        lengths = np.array([len(row) for row in ids], np.int32)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        nothing, pad_id = np.zeros(len(ids), np.int64), self.cutter.tokenizer.pad_token_id
        split = TokenSplit(np.concatenate(ids).astype(np.int32), nothing, lengths, starts, pad_id, "")
        logits = self._logits(self.forward, split, np.arange(len(ids)))
        if self.precision == "bf16":
            best = np.sort(logits, axis=1)
            close = np.flatnonzero(best[:, -1] - best[:, -2] < CLOSE)
            if len(close):
                logits[close] = self._logits(self.exact, split, close)
        return softmax(logits, axis=1)

    @torch.inference_mode()
    def _logits(self, forward: Forward, split: TokenSplit, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), len(self.saved.label_names)))
        for places in sorted_batches(split.lengths[rows], BATCH_SIZE, tokens_at_once(self.device)):
            found[places] = forward(split.batch(rows[places]).to(self.device)).cpu().double().numpy()
        return found


def predict(config: TrainConfig) -> None:
    """Label the texts of the command line, of --input or of standard input; write JSON lines or added columns."""
    if sys.stdout is None and config.output is None:  # closed, as by >&-
        raise UserError("--predict: expected standard output or --output FILE to write to")
    saved = open_saved(config.runs[0], "predict")
    trained_on = saved.record["config"].get("text_column") or saved.record["data"].get("text_column")
    source = open_input(config.texts, config.input, config.text_column, trained_on)
    sink = open_output(config.output, source, saved.label_names)
    predictor = Predictor(saved, config.device, config.precision)
    # A bar between the answers on a terminal would be in the way.
    quiet = config.output is None and (sys.stdout.isatty() or config.texts)
    bar = nullcontext() if quiet else progress_bar(None, "predicting")
    with closing(sink), bar as progress, until_nobody_reads(), ctrl_c() as stopped:
        for window in source.windows:
            there = [number for number, text in enumerate(window.texts) if text.strip()]
            found = Answers(np.full(len(window.texts), -1), np.zeros((len(window.texts), len(saved.label_names))))
            if there:
                found.probabilities[there] = predictor([window.texts[number] for number in there])
                found.labels[there] = found.probabilities[there].argmax(axis=1)
            sink.write(window, found)
            if progress is not None:
                progress.update(len(window.texts))
            if stopped:
                raise KeyboardInterrupt


@contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """Ctrl-C as ever, and noted, since Python drops it where it comes while an object is being deleted."""
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def until_nobody_reads() -> Iterator[None]:
    """End quietly if whoever reads the answers has gone, as `head` does."""
    try:
        yield
    except BrokenPipeError:
        silence(sys.stdout)


def merge(config: TrainConfig) -> Path:
    """Write RUN/merged: plain weights that transformers reads, adapters added to the weights they adapt."""
    saved = open_saved(config.runs[0], "merge")
    if saved.record["method"] != "lora":
        raise saved.error(f"expected a LoRA run; this one is {saved.record['method']}, and model/ is all there is")
    folder = saved.path / "merged"
    if not folder.exists():
        tokenizer, model = saved.load()
        card = (saved.folder / "README.md").read_text(encoding="utf-8")
        card = card.replace("library_name: peft", "library_name: transformers")
        scratch = Path(tempfile.mkdtemp(dir=saved.path, prefix=".merged"))
        try:
            with models.writing(saved.path):
                models.save_model(model, tokenizer, scratch, card)
            os.chmod(scratch, 0o755)  # noqa: PTH101, S103 - a temporary folder is private, a model is not
            try:
                scratch.rename(folder)
            except OSError:
                if not folder.exists():  # else another process has merged it meanwhile
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    print(f"merged weights: {folder}")
    if config.push_to_hub:
        hub.upload(folder, config.push_to_hub)
    return folder
