"""The command line: every flag, its default, its help text and its check, once.

A flag is a field of `TrainConfig`; the parser is built from the fields. Nothing heavy is imported here, so
that `--help` and a wrong flag answer at once.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

DEFAULT_MODEL = "distilbert-base-uncased"
DEFAULT_DATASET = "rotten_tomatoes"
NEWEST = "newest"  # --resume without a run
RECORDED_PATHS, OTHER_PATHS = "dataset dataset_dir model output_dir", "input output plots_dir export"
PATHS = f"{RECORDED_PATHS} {OTHER_PATHS}".split()
LOCAL_CLUSTER = "local"  # --ray without an address
MODES = ("finetune", "baseline", "predict", "merge", "sweep", "report", "sync")
# Flags by the modes that read them. --sweep hands its own to every cell.
_LEARN = ("finetune", "baseline", "sweep")
_READ_BY = {
    _LEARN: "dataset dataset_dir label_column max_length truncation limit model class_weights seed project",
    ("finetune", "baseline", "predict", "sweep"): "text_column precision device",
    ("finetune", "sweep"): "lora_r lora_alpha lora_dropout lora_layers epochs lr batch_size plain on_nan save_every "
    "gradient_accumulation_steps weight_decay warmup_ratio max_grad_norm",
    ("finetune",): "peft resume",
    ("predict",): "input output",
    (*_LEARN, "sync"): "wandb comet",
    ("finetune", "baseline", "merge"): "push_to_hub",
    (*_LEARN, "report"): "output_dir",
    ("report",): "plots_dir export",
    ("sweep",): "dry_run workers ray",
}
ASKS_FOR_MORE = {"peft", "resume", "input", "output", "push_to_hub", "dry_run", "ray", "export"}
READ_BY = {name: modes for modes, names in _READ_BY.items() for name in names.split()}
GROUPS = ("data", "model", "training", "prediction", "tracking", "output", "sweeps and reports", "seldom needed")


class UserError(ValueError):
    """Something the user can put right. `main` shows it as one line and exits with code 2."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(message: str) -> str:
    """The message without line breaks, which names and values from outside may bring along."""
    return " ".join(message.splitlines())


def first_line(error: Exception) -> str:
    """What an error of another library says first; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def say(line: str) -> None:
    """One line for the user, on stderr, at once. Where nobody can read them any more, a run goes on without."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # a pipe whose reader has gone, a terminal that was closed, a log on a full disk
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Send what is written to `stream` from now on nowhere: Python itself flushes it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Interrupted(KeyboardInterrupt):
    """The user stopped a run or a sweep, and `message` says how it goes on. `exit_code`: 128 + the signal's number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def flag(default: Any, group: str, help: str, **argparse_options: Any) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"group": group, "help": help, "options": argparse_options})


@dataclass(frozen=True)
class TrainConfig:
    """What one call of the tool was asked to do. Checked when it is made, never changed afterwards."""

    mode: str = "finetune"
    # --report: the run folders to show, all under output_dir if empty; --predict, --merge, --sync: their one run;
    # --sweep: its file
    runs: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()  # --predict: what follows the run
    given: str = ""  # --sweep: the flags given beside it, with commas; they hold for every cell, over the file

    # `None` means that the user left the default: only then may the packaged default stand in for the hub.
    dataset: str | None = flag(
        None,
        "data",
        "rotten_tomatoes, sst2, imdb, ag_news, a hub id (owner/name), a folder of splits or one file "
        f"(CSV, TSV, JSONL, parquet) (default: {DEFAULT_DATASET})",
        names=("--dataset", "--dataset_name"),
    )
    dataset_dir: str | None = flag(
        None, "seldom needed", "look for named datasets here first, as DIR/NAME/*.parquet", metavar="DIR"
    )
    text_column: str | None = flag(
        None, "data", "name of the column of texts (default: text, sentence, review, ...)", metavar="NAME"
    )
    label_column: str | None = flag(
        None, "data", "name of the column of labels (default: label, sentiment, class, ...)", metavar="NAME"
    )
    max_length: int | None = flag(
        None, "data", "cut texts after this many tokens (default: the model's limit, at most 512)", type=int
    )
    truncation: str = flag(
        "head",
        "data",
        "what stays of a longer text: its beginning, or a quarter of the tokens from there and the rest from its end",
        choices=("head", "head_tail"),
    )
    limit: int | None = flag(None, "data", "train on a seeded random N of the training rows", type=int, metavar="N")

    model: str | None = flag(
        None, "model", f"hub id or local folder of an encoder (default: {DEFAULT_MODEL})", metavar="MODEL"
    )
    peft: bool = flag(False, "model", "train LoRA adapters and the head instead of every weight", switch=True)
    lora_r: int = flag(16, "model", "rank of the adapters", type=int, metavar="R")
    lora_alpha: float = flag(32, "model", "the adapters' output is scaled by alpha / r", type=float, metavar="A")
    lora_dropout: float = flag(0.1, "seldom needed", "dropout in front of the adapters", type=float, metavar="P")
    lora_layers: int | None = flag(
        None, "model", "adapt the last K layers only; those below run once (default: all)", type=int, metavar="K"
    )

    epochs: int = flag(3, "training", "passes over the training rows", type=int)
    lr: float = flag(2e-5, "training", "peak learning rate", type=float)
    batch_size: int = flag(16, "training", "examples in one forward pass, all processes together", type=int)
    gradient_accumulation_steps: int = flag(
        1, "seldom needed", "forward passes in one optimiser step", type=int, metavar="N"
    )
    class_weights: str = flag(
        "none",
        "training",
        "balanced: each class counts the same in the loss, however many rows it has",
        choices=("none", "balanced"),
    )
    weight_decay: float = flag(0.01, "seldom needed", "AdamW weight decay, for matrices only", type=float)
    warmup_ratio: float = flag(0.1, "seldom needed", "share of the steps over which the rate rises", type=float)
    max_grad_norm: float = flag(1.0, "seldom needed", "clip the gradient to this norm; 0 turns it off", type=float)
    seed: int = flag(42, "training", "decides the head's first weights, the batches and the dropout", type=int)
    precision: str = flag(
        "auto", "training", "auto: bf16 where the device does it natively, else fp32", choices=("auto", "fp32", "bf16")
    )
    plain: bool = flag(False, "seldom needed", "use transformers' own modules, not the fast path", switch=True)
    on_nan: str = flag(
        "stop", "seldom needed", "where a gradient is not finite: stop, or skip the step", choices=("stop", "skip")
    )
    device: str = flag("auto", "training", "auto (cuda if available), cpu, cuda, cuda:N or mps")

    input: str | None = flag(
        None, "prediction", "texts to label: txt, CSV, TSV, JSONL or parquet (default: standard input)", metavar="FILE"
    )
    output: str | None = flag(
        None, "prediction", "write JSON lines, or the input with more columns, by the ending", metavar="FILE"
    )

    wandb: bool = flag(False, "tracking", "log to Weights & Biases; offline without a key", switch=True)
    comet: bool | None = flag(None, "tracking", "log to Comet (default: where an API key is configured)", switch=True)
    project: str = flag("distilbert-sentiment", "seldom needed", "project name at W&B and Comet", metavar="NAME")

    resume: str | None = flag(
        None,
        "output",
        "go on with an unfinished run, in the middle of an epoch (alone: the newest one of this config)",
        nargs="?",
        const=NEWEST,
        metavar="RUN",
    )
    save_every: int | None = flag(
        None, "seldom needed", "steps between checkpoints (default: by time, about 1% of it)", type=int, metavar="N"
    )
    push_to_hub: str | None = flag(
        None, "output", "upload the model to the hub at the end, as a private repository", metavar="NAME"
    )
    output_dir: str = flag("runs", "output", "run folders are made here", metavar="DIR")
    plots_dir: str = flag(
        "plots", "sweeps and reports", "--report writes report.md, report.html and pictures here", metavar="DIR"
    )
    dry_run: bool = flag(False, "sweeps and reports", "--sweep: list the cells and the time they need", switch=True)
    workers: int = flag(
        1, "sweeps and reports", "--sweep: runs at once on a machine, which share its cores", type=int, metavar="N"
    )
    ray: str | None = flag(
        None,
        "sweeps and reports",
        "--sweep: on the machines of a Ray cluster (alone: a new one on this machine)",
        nargs="?",
        const=LOCAL_CLUSTER,
        metavar="ADDRESS",
    )
    export: str | None = flag(
        None, "sweeps and reports", "--report: also write the runs as small records, without texts", metavar="DIR"
    )

    def __post_init__(self) -> None:
        counts = "limit lora_r lora_layers epochs batch_size gradient_accumulation_steps save_every workers"
        for low, names in ((0, "seed"), (1, counts), (3, "max_length")):
            self._require(names, low.__le__, f"a whole number of at least {low}")
        self._require("lora_r", lambda rank: rank <= 65_536, "at most 65536")  # more than any layer is wide
        self._require("lr lora_alpha", lambda value: 0 < value < math.inf, "a number above 0")
        self._require("weight_decay max_grad_norm", lambda value: 0 <= value < math.inf, "a number of at least 0")
        self._require("lora_dropout warmup_ratio", lambda value: 0 <= value <= 0.99, "a number from 0 to 0.99")
        self._require("seed", lambda value: value < 2**32, "a whole number below 2**32")
        self._require("device", re.compile(r"auto|cpu|mps|cuda(:\d+)?").fullmatch, "auto, cpu, cuda, cuda:N or mps")
        self._require(f"{OTHER_PATHS} resume push_to_hub", str.strip, "a name or a path")
        self._require(f"{RECORDED_PATHS} text_column label_column project", _is_name, "a name or a path, in UTF-8")
        for name in PATHS:
            object.__setattr__(self, name, _at_home(getattr(self, name)))
        object.__setattr__(self, "runs", tuple(map(_at_home, self.runs)))
        if blank := [run for run in self.runs if not run.strip()]:
            raise UserError(f"--{self.mode}: expected a name or a path, got {blank[0]!r}")
        if self.lr * self.weight_decay >= 1:
            raise UserError(f"--weight_decay: expected less than 1 / lr, got {self.weight_decay:g} with lr {self.lr:g}")
        if self.texts and self.input:
            raise UserError(f"--predict: expected texts or --input, got {self.texts[0]!r} and {self.input!r}")

    def _require(self, names: str, ok: Callable[[Any], Any], expected: str) -> None:
        for name in names.split():
            if (value := getattr(self, name)) is not None and not ok(value):
                raise UserError(f"--{name}: expected {expected}, got {value!r}")

    @property
    def method(self) -> str:
        """What a reader would call the run's method: full, lora or baseline."""
        return "baseline" if self.mode == "baseline" else "lora" if self.peft else "full"

    def refuse_unread(self, given: Iterable[str]) -> "TrainConfig":
        """Return self. UserError for a flag in `given` that asks for what this mode cannot do; any other unread one is
        noted."""
        for name, owner in ((name, unread(name, self.mode, self.peft)) for name in given):
            if owner and (name.startswith("lora_") or name in ASKS_FOR_MORE):
                raise UserError(f"--{name} goes with {owner}")
            if owner:
                say(f"note: --{name} does nothing here; it goes with {owner}")
        return self


def _is_name(value: str) -> bool:
    """Not blank, and no bytes that are no UTF-8: records are."""
    return bool(value.strip()) and value.encode(errors="replace").decode() == value


def _at_home(path: str | None) -> str | None:
    """No shell expands the ~ of --output_dir=~/runs, nor that of a sweep's file."""
    return os.path.expanduser(path) if path and path.startswith("~") else path  # noqa: PTH111 - never raises


def unread(name: str, mode: str, peft: bool) -> str:
    """Which flags `name` goes with, in words, if such a call does not read it; otherwise an empty string."""
    lora_alone = name.startswith("lora_") and mode == "finetune" and not peft
    return "--peft" if lora_alone else "" if mode in READ_BY[name] else " or ".join(f"--{one}" for one in READ_BY[name])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on stderr and exit code 2: the usage text would bury what went wrong."""
        self.exit(2, f"error: {one_line(message)} (see python main.py --help)\n")


def _reader(kind: type, expected: str) -> Callable[[str], Any]:
    def read(word: str) -> Any:
        try:
            return kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {word!r}") from None

    return read


def build_parser() -> argparse.ArgumentParser:
    """The parser for every field of `TrainConfig`, grouped as the fields are."""
    parser = _Parser(
        prog="python main.py",
        usage="python main.py MODE [flags]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        description="Fine-tune DistilBERT for sentiment, fully or with LoRA, and know which way was better.",
        epilog="Flags are also understood with hyphens: --batch-size is --batch_size.",
        allow_abbrev=False,
    )
    parser.register("type", int, _reader(int, "a whole number"))
    parser.register("type", float, _reader(float, "a number"))
    modes = parser.add_argument_group("modes (exactly one)").add_mutually_exclusive_group()
    modes.add_argument("--finetune", action="store_true", help="fine-tune the whole encoder; with --peft, LoRA")
    modes.add_argument("--baseline", action="store_true", help="fit a LinearSVC on frozen CLS embeddings")
    modes.add_argument(
        "--predict", nargs="+", metavar=("RUN", "TEXT"), help="label texts with a run; lines of standard input if none"
    )
    modes.add_argument("--merge", metavar="RUN", help="write a LoRA run's plain weights to RUN/merged")
    modes.add_argument("--sweep", metavar="FILE", help="run the grid of a TOML file; what is finished is skipped")
    modes.add_argument("--report", nargs="*", metavar="RUN", help="draw and tabulate finished runs (default: all)")
    modes.add_argument("--sync", metavar="RUN", help="upload a run to W&B and Comet (default: where it was recorded)")

    groups = {group: parser.add_argument_group(group) for group in GROUPS}
    for spec in fields(TrainConfig):
        if not spec.metadata:
            continue
        options = dict(spec.metadata["options"])
        names = options.pop("names", (f"--{spec.name}",))
        help_text = spec.metadata["help"].replace("%", "%%")
        if options.pop("switch", False):
            options["action"] = argparse.BooleanOptionalAction if spec.default is None else "store_true"
        elif spec.default is not None:
            help_text += f" (default: {spec.default})"
        groups[spec.metadata["group"]].add_argument(
            *names, dest=spec.name, default=argparse.SUPPRESS, help=help_text, **options
        )
    return parser


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """Command line -> `TrainConfig`. Exits with code 2 and one line on stderr where a flag is wrong."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    values, behind = vars(parser.parse_args([_with_underscores(word) for word in words[:end]])), words[end + 1 :]
    chosen = {mode: values.pop(mode) for mode in MODES}  # now values holds what was given, and TrainConfig the defaults
    mode = next((mode for mode in MODES if chosen[mode] not in (None, False)), None)
    named = chosen.get(mode)  # --predict and --report: several; --merge, --sync and --sweep: one; the rest: none
    runs = tuple(named) if isinstance(named, list) else (named,) if isinstance(named, str) else ()
    runs, texts = (runs[:1], (*runs[1:], *behind)) if mode == "predict" else (runs, ())
    if behind and mode != "predict":  # argparse would take a text that begins with - for a flag
        parser.error(f"-- is for texts after --predict RUN, got {' '.join(behind)!r}")
    asked = {"mode": mode, "runs": runs, "texts": texts}
    asked["given"] = ",".join(values) if mode == "sweep" else ""
    run = values.get("resume")
    if mode is None and run == NEWEST:
        parser.error("--resume alone goes with --finetune and the flags of that run; or name it: --resume RUN")
    if mode is None and run is None:
        parser.print_help(sys.stderr)
        parser.exit(2, "\nerror: choose one of " + ", ".join(f"--{mode}" for mode in MODES) + "\n")
    try:
        if run is not None and run != NEWEST:
            return _config_of(run, {**values, **({"mode": mode} if mode else {})})
        return TrainConfig(**asked, **values).refuse_unread(values)
    except UserError as error:
        parser.error(str(error))


def _config_of(run: str, given: dict[str, Any]) -> TrainConfig:
    """The config that `run` began with. What is given beside --resume must agree with it."""
    run = _at_home(run)
    try:
        stored = json.loads(Path(run, "config.json").read_text(encoding="utf-8"))["config"]
        defaults = {spec.name: spec.default for spec in fields(TrainConfig)}  # of flags that are newer than the run
        if unknown := stored.keys() - defaults.keys():
            raise KeyError(min(unknown))
        stored = {**defaults, "mode": stored["mode"], **stored}
        stored |= {"runs": (), "texts": (), "resume": run}
        strange = [spec.name for spec in fields(TrainConfig) if spec.metadata and not of_kind(spec, stored[spec.name])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "expected a run folder with config.json, got" if isinstance(error, OSError) else "damaged config.json in"
        raise UserError(f"--resume: {what} {run!r} ({error})") from error
    if strange or stored["mode"] not in MODES:
        raise UserError(f"--resume: {run}/config.json holds a wrong value under {(strange or ['mode'])[0]}")
    given = {key: _at_home(value) if key in (*PATHS, "resume") else value for key, value in given.items()}
    differ = [f"{key} was {stored[key]!r}, given {value!r}" for key, value in given.items() if stored[key] != value]
    if differ:
        raise UserError(f"--resume {run}: that run had another config: {'; '.join(differ)}")
    try:
        config = TrainConfig(**stored)
    except UserError as error:
        raise UserError(f"--resume: {run}/config.json holds a wrong value: {error}") from error
    return config.refuse_unread(["resume"])


def of_kind(spec: Field, value: Any) -> bool:
    """Whether the flag `spec` takes `value`, as far as its type and its choices go."""
    options = spec.metadata["options"]
    if value is None:
        return spec.default is None
    if options.get("switch"):
        return isinstance(value, bool)
    kind = options.get("type", str)
    fits = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
    if fits and kind is float:
        fits = abs(value) <= sys.float_info.max  # not a whole number that no float can hold
    return fits and value in options.get("choices", (value,))


def _with_underscores(word: str) -> str:
    """--batch-size=8 -> --batch_size=8 and --no_comet -> --no-comet, as argparse spells it; values stay as they are."""
    if not re.match(r"--[A-Za-z][\w-]*(=|\Z)", word):  # a text to label may begin with --, too
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    return "--" + ("no-" + name[3:] if name.startswith("no_") else name) + equals + value
