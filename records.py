"""What finished runs left behind, read from their folders or from the small records made of these.

A small record holds no text and no path of its maker's machine: `NAME.run.json` has what a report needs of one run,
and `rows-*.json` what it needs of the test rows, once for all runs that share them. Both give the same report.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from grid import cell_names, identity

FORMAT = 1
# Numbers that every run has, and what else is kept of it.
MEASURED = ("trainable_parameters", "total_parameters", "train_seconds", "samples_per_second", "peak_memory_bytes")
FACTS = ("best_epoch", *MEASURED, "cache_seconds", "memory_before_training_bytes", "precision", "device", "git_commit")
CURVES = ("val/loss", "val/accuracy", "val/precision", "val/recall", "val/f1")
# Where a run found its model and data. Which they are is told by their names and fingerprints.
PLACES = ("dataset", "dataset_dir", "model")
NEGATION = re.compile(r"\b(?:not?|never|nothing|nobody|nowhere|neither|nor|none|without|hardly|barely|cannot)\b|n't\b")


@dataclass(frozen=True)
class Rows:
    """The rows of one test set."""

    fingerprint: str
    labels: np.ndarray  # [n] class ids
    words: np.ndarray  # [n] words in the text
    negated: np.ndarray  # [n] bool: the text holds a negation
    texts: tuple[str, ...] | None  # None in small records


@dataclass(frozen=True)
class Run:
    """One finished run."""

    name: str
    config: dict[str, Any]  # what it computed, without PLACES
    method: str
    model: dict[str, str]  # name, kind, fingerprint
    data: dict[str, Any]  # name, kind, labels, rows, fingerprints, notes (records from before lack those)
    facts: dict[str, Any]
    val: dict[str, Any]
    test: dict[str, Any]
    curve: dict[str, list[float]]  # "epoch" and CURVES, after each epoch; a baseline has one entry, epoch 0
    predicted: np.ndarray  # [n] class ids, test rows
    confidence: np.ndarray  # [n] probability of the predicted class, to 4 decimals
    rows: Rows

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def cell(self) -> tuple:
        """The same for runs that differ in their seed alone. Where --limit draws the training rows by the seed, all
        draws are taken to be of the same rows."""
        found = self.data["fingerprints"]
        rows = (*((found["train"],) if self.config["limit"] is None else ()), found["validation"], found["test"])
        places = {"dataset": rows, "model": self.model["fingerprint"]}
        return tuple((key, value) for key, value in identity({**self.config, **places}) if key != "seed")

    @property
    def method_key(self) -> tuple:
        """`cell` but for the learning rate: each method is judged at its best one."""
        return tuple((key, value) for key, value in self.cell if key != "lr")

    @property
    def machine(self) -> str:
        """The device with its number of threads, and the precision: costs can be compared where these are the same,
        and the version of the program is (`facts["git_commit"]`)."""
        return f"{self.facts['device']}, {self.facts['precision']}"

    @property
    def key(self) -> tuple:
        """`cell`, under the data set's name: others may have the same test rows."""
        return self.data["name"], self.cell


@dataclass(frozen=True)
class Cell:
    """The runs of one configuration on one test set, one a seed."""

    name: str
    method: str  # the name without the learning rate
    runs: tuple[Run, ...]
    repeats: tuple[Run, ...] = ()  # of a seed on another machine: they count for costs, not for quality

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def seeded(self) -> bool:
        """Whether another seed would give another run. A baseline draws nothing but the rows that --limit leaves."""
        return self.first.method != "baseline" or self.first.config["limit"] is not None

    @property
    def few_rows(self) -> bool:
        """Whether nothing is to be said of differences: at 100 test rows the intervals of a precision near 1 cover the
        truth in 80% of repetitions, at 12 those of an accuracy near 1 in 45."""
        return len(self.first.rows.labels) < 200

    def fact(self, key: str) -> float | None:
        """The mean over the seeds, or None where a run lacks it."""
        values = [run.facts.get(key) for run in self.runs]
        return None if None in values else float(np.mean(values))

    def on(self, machine: str) -> "Cell | None":
        """Its runs on one machine; None if there are none. Costs are comparable only there."""
        runs = tuple(run for run in (*self.runs, *self.repeats) if run.machine == machine)
        return replace(self, runs=runs, repeats=()) if runs else None

    def val(self, key: str) -> float:
        """The mean over the seeds of a validation metric, each at its run's best epoch."""
        return float(np.mean([run.val[key] for run in self.runs]))


def read_runs(paths: list[Path]) -> list[Run]:
    """Every finished run in `paths`: run folders, folders of run folders, small records, or folders of these.

    Raises UserError where a path holds none, or one that cannot be read.
    """
    found, rows = [], {}
    for path in paths:
        if path.name.endswith(".run.json"):
            files = [path]
        elif (path / "result.json").exists():
            files = [path / "result.json"]
        else:
            files = [*path.glob("*/result.json"), *path.glob("*/*/result.json"), *path.glob("**/*.run.json")]
        if not path.exists():
            raise UserError(f"--report: {path} does not exist; python main.py --finetune makes a run")
        if not files and (path / "config.json").exists():
            again = f"python main.py --resume {shlex.quote(str(path))}"
            raise UserError(f"--report: {path} is not a finished run; go on with it: {again}")
        if not files:
            raise UserError(f"--report: no finished run in {path}; make one with python main.py --finetune")
        for file in sorted(files):
            try:
                found.append(
                    _from_folder(file.parent, rows) if file.name == "result.json" else _from_record(file, rows)
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{file}: expected the record of a finished run: {reason}") from error
    return found


def group_cells(runs: list[Run]) -> tuple[list[list[Cell]], list[str]]:
    """The cells of each (data set, test rows, encoder), and the names of runs that repeat another's cell and seed.

    Of like runs the first counts, so that none can be chosen by its result. Methods come in a fixed order, so that the
    same runs give the same report, however they were named.
    """
    groups: dict[tuple, dict[tuple, dict[int, Run]]] = {}
    again: dict[int, list[Run]] = {}  # by the id of the cell's dict of seeds
    repeats = []
    for run in runs:
        test = (run.data["name"], run.data["fingerprints"]["test"], run.model["fingerprint"])
        seeds = groups.setdefault(test, {}).setdefault(run.cell, {})
        if run.seed in seeds:
            repeats.append(run.name)
            if run.machine != seeds[run.seed].machine:
                again.setdefault(id(seeds), []).append(run)
        seeds.setdefault(run.seed, run)
    done = []
    for test in sorted(groups):
        cells = [tuple(seeds[seed] for seed in sorted(seeds)) for seeds in groups[test].values()]
        others = [tuple(again.get(id(seeds), ())) for seeds in groups[test].values()]
        firsts = [some[0] for some in cells]
        names = _told_apart(cell_names([run.config for run in firsts]), firsts, [run.cell for run in firsts])
        methods = cell_names([run.config for run in firsts], ("seed", "lr"))
        methods = _told_apart(methods, firsts, [run.method_key for run in firsts])
        order = ("baseline", "full", "lora")
        keys = [
            (order.index(some[0].method), some[0].config.get("lora_layers") or 99, some[0].config["lora_r"])
            + (some[0].config["lr"], name)
            for some, name in zip(cells, names)
        ]
        places = sorted(range(len(cells)), key=keys.__getitem__)
        done.append([Cell(names[at], methods[at], cells[at], others[at]) for at in places])
    return done, repeats


def _told_apart(names: list[str], runs: list[Run], keys: list[tuple]) -> list[str]:
    """`names`, with the fingerprint of the training or validation rows behind those that several keys share: such runs
    have the same config, and the rows behind its data set have changed."""
    for split in ("train", "validation"):
        kinds = {name: {key for other, key in zip(names, keys) if other == name} for name in names}
        names = [
            f"{name} {split} {run.data['fingerprints'][split][:6]}" if len(kinds[name]) > 1 else name
            for name, run in zip(names, runs)
        ]
    return names


def timed_alone(machines: Iterable[str]) -> list[str]:
    """Those of the machines that a run had to itself (see device.device_name); where there are none, all: the times of
    runs that shared one say nothing about a run alone."""
    machines = sorted(set(machines))
    return [machine for machine in machines if "runs at once" not in machine] or machines


def export(runs: list[Run], folder: Path) -> list[Path]:
    """Write the small records of `runs` to `folder`; a run exported before is written over. Returns their paths.

    Where a cell and seed ran again, the others get numbers: in the order of the names the first still comes first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for run in runs:
        rows = run.rows
        content = {
            "format": FORMAT,
            "fingerprint": rows.fingerprint,
            "labels": rows.labels.tolist(),
            "words": rows.words.tolist(),
            "negated": rows.negated.astype(int).tolist(),
        }
        _write_lines(folder / f"rows-{rows.fingerprint[:16]}.json", content)
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{run.data['name']} {cell_names([run.config])[0]} seed{run.seed}")
        key = hashlib.sha256(repr((run.cell, run.seed)).encode()).hexdigest()[:8]
        content = {"format": FORMAT} | {field: getattr(run, field) for field in _AS_THEY_ARE}
        content |= {
            "test_rows": rows.fingerprint,
            "predicted": run.predicted.tolist(),
            "confidence": np.rint(run.confidence * 10_000).astype(int).tolist(),  # in ten-thousandths
        }
        path, again = folder / f"{name}-{key}.run.json", 1
        while path in written:
            again += 1
            path = folder / f"{name}-{key}_{again}.run.json"
        _write_lines(path, content)
        written.append(path)
    return written


_AS_THEY_ARE = ("name", "config", "method", "model", "data", "facts", "val", "test", "curve")


def _write_lines(path: Path, content: dict[str, Any]) -> None:
    """JSON with a line for each key, so that a diff shows what changed."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in content.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _from_record(file: Path, rows: dict[str, Rows]) -> Run:
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
    fingerprint = content["test_rows"]
    if fingerprint not in rows:
        stored = json.loads((file.parent / f"rows-{fingerprint[:16]}.json").read_text(encoding="utf-8"))
        labels, words = np.asarray(stored["labels"]), np.asarray(stored["words"])
        rows[fingerprint] = Rows(fingerprint, labels, words, np.asarray(stored["negated"], bool), None)
    predicted, confidence = np.asarray(content["predicted"]), np.asarray(content["confidence"]) / 10_000
    values = {field: content[field] for field in _AS_THEY_ARE}
    return _whole(Run(**values, predicted=predicted, confidence=confidence, rows=rows[fingerprint]))


def _whole(run: Run) -> Run:
    """`run`. ValueError where it has more or fewer predictions than test rows, or lacks what a report needs."""
    if not len(run.predicted) == len(run.confidence) == len(run.rows.labels):
        raise ValueError(f"{len(run.predicted)} predictions of {len(run.rows.labels)} test rows")
    needed = {name: run.facts.get(name) for name in MEASURED}
    for split, scores in (("val", run.val), ("test", run.test)):
        needed |= {f"{split} {name}": scores.get(name) for name in ("accuracy", "precision")}
    lacking = [name for name, value in needed.items() if not isinstance(value, int | float)]
    lacking += [name for name in CURVES if not run.curve[name]]
    if lacking:
        raise ValueError(f"no number for {', '.join(lacking)}")
    _ = run.key, run.seed  # what a damaged config raises, it raises here
    return run


def _from_folder(folder: Path, rows: dict[str, Rows]) -> Run:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    predictions, metrics = read_lines(folder / "predictions.jsonl"), read_lines(folder / "metrics.jsonl")
    ids = {label: number for number, label in enumerate(result["data"]["labels"])}
    fingerprint = result["data"]["fingerprints"]["test"]
    if fingerprint not in rows or rows[fingerprint].texts is None:
        texts = tuple(line["text"] for line in predictions)
        rows[fingerprint] = Rows(
            fingerprint,
            np.array([ids[line["label"]] for line in predictions]),
            np.array([len(text.split()) for text in texts]),
            np.array([bool(NEGATION.search(text.lower())) for text in texts]),
            texts,
        )
    epochs = [line for line in metrics if "val/loss" in line]
    curve = {key: [float(line[key]) for line in epochs] for key in ("epoch", *CURVES)}
    run = Run(
        folder.name,
        {key: value for key, value in identity(result["config"]) if key not in PLACES},
        result["method"],
        {key: result["model"][key] for key in ("name", "kind", "fingerprint")},
        {key: result["data"][key] for key in ("name", "kind", "labels", "rows", "fingerprints", "notes")},
        {key: result.get(key) for key in FACTS},
        result["val"],
        result["test"],
        curve,
        np.array([ids[line["prediction"]] for line in predictions]),
        np.array([round(line["probability"], 4) for line in predictions]),
        rows[fingerprint],
    )
    return _whole(run)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    with path.open(encoding="utf-8", newline="\n") as lines:  # a text may hold other ends of lines than JSON's
        return [json.loads(line) for line in lines]
