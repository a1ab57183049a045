"""Texts in and answers out, a window at a time: standard input, txt, CSV, TSV, JSON lines, parquet.

Nothing is held but the window at hand, so a pipe of any length runs in constant memory. Only whole lines are written,
Ctrl-C or not.
"""

import csv
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from config import UserError, say
from readers import brief, choose_column, csv_rows, is_text, json_rows, open_file, text_lines, unpaired

WINDOW_ROWS = 4096
WINDOW_CHARACTERS = 2**23  # for texts of a megabyte each
FIRST_ROWS = 100  # of JSON: a column is looked for in all of them
LABEL, PROBABILITIES = "predicted_label", "probabilities"
Choose = Callable[[list[str], str], str]  # the columns of a file and its name -> that of the texts
INPUTS = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".parquet")


class Window(NamedTuple):
    """Some rows of the input, one after the other."""

    texts: list[str]  # "" where there is none
    rows: list[dict[str, Any]] | pa.Table  # all they hold; {} for an empty line


class Answers(NamedTuple):
    """What the model says of a window's n rows."""

    labels: np.ndarray  # [n] class ids, -1 for a row without text
    probabilities: np.ndarray  # [n, classes]


class Source(NamedTuple):
    windows: Iterator[Window]
    kind: str  # "lines" (texts alone), "csv", "tsv", "json" or "parquet"
    file: Path | None


def open_input(texts: tuple[str, ...], file: str | None, text_column: str | None, guess: str | None) -> Source:
    """The texts given, the file named, or standard input. UserError where there is nothing to read.

    text_column: that of the file, where the user named it; guess: that of the file the run was trained on.
    """
    choose = partial(choose_column, "text", wanted=text_column, guess=guess)
    if bad := next(filter(unpaired, texts), None):
        raise UserError(f"--predict: expected texts in UTF-8, got {brief(bad)}")
    if texts:
        return Source(_windows(({"text": text}, text) for text in texts), "lines", None)
    if file is None:
        if sys.stdin is None or sys.stdin.closed:
            raise UserError("--predict: expected texts after the run, --input FILE, or lines on standard input")
        if sys.stdin.isatty():
            say("one text a line; Ctrl-D ends")
        rows = 1 if sys.stdin.isatty() else WINDOW_ROWS  # who types a line waits for its answer
        return Source(_windows(_lines(sys.stdin.buffer, "standard input"), rows), "lines", None)
    path = Path(file)
    ending = path.suffix.lower()
    if ending not in INPUTS:
        raise UserError(f"--input {file}: expected a file that ends in {' '.join(INPUTS)}")
    if ending == ".parquet":
        return Source(_parquet_windows(path, choose), "parquet", path)
    with open_file(path):
        pass  # a file that is not there is told before the model is loaded
    if ending == ".txt":
        return Source(_windows(_lines(path, file)), "lines", path)
    if ending in (".csv", ".tsv"):
        return Source(_windows(_some(_csv(path, choose), path)), ending[1:], path)
    return Source(_windows(_some(_json(path, choose, text_column), path)), "json", path)


def _windows(rows: Iterator[tuple[dict[str, Any], str]], most: int = WINDOW_ROWS) -> Iterator[Window]:
    found, characters = [], 0
    for row in rows:
        found.append(row)
        characters += len(row[1])
        if len(found) == most or characters > WINDOW_CHARACTERS:
            yield Window([text for _, text in found], [row for row, _ in found])
            found, characters = [], 0
    if found:
        yield Window([text for _, text in found], [row for row, _ in found])


def _some(rows: Iterator[tuple[dict[str, Any], str]], file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The same rows. UserError where there are none."""
    row = None
    for row in rows:
        yield row
    if row is None:
        raise UserError(f"{file}: expected rows of text, found none")


def _lines(source: Path | BinaryIO, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    handle = open_file(source) if isinstance(source, Path) else source
    for line in text_lines(handle, name):
        text = line.rstrip("\r\n")
        yield {"text": text}, text


def _csv(file: Path, choose: Choose) -> Iterator[tuple[dict[str, Any], str]]:
    rows = csv_rows(file)
    for line, header in islice(rows, 1):
        column = choose(header, f"{file}, line {line} (taken as the header)")
        _check_free(header, f"{file}, line {line}")
        _check_different(header, f"{file}, line {line}")
    for _, cells in rows:
        row = dict(zip(header, cells))
        yield row, row.get(column, "")


def _json(file: Path, choose: Choose, text_column: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    rows = json_rows(file)
    first = list(islice(rows, FIRST_ROWS))
    names = list(dict.fromkeys(name for _, row in first for name in row))
    column, seen = text_column, text_column is None
    if column is None and names:
        column = choose(names, str(file))
    for line, row in chain(first, rows):
        where = f"{file}, line {line}"
        if row and column is None:
            column = choose(list(row), where)
        seen = seen or column in row
        if not seen and line == WINDOW_ROWS:
            break
        _check_free(row, where)
        text = row.get(column) if row else None
        if not isinstance(text, str | None) or unpaired(text):
            raise UserError(f"{where}: expected a text under {column!r}, found {brief(text)}")
        yield row, text or ""
    if not seen:  # a row may lack the column that the user named, but not all of them
        choose(names, str(file))


def _parquet_windows(file: Path, choose: Choose) -> Iterator[Window]:
    try:
        parquet = pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: expected a parquet file: {brief(str(error))}") from error
    names = parquet.schema_arrow.names
    _check_different(names, str(file))
    column = choose(names, str(file))
    _check_free(names, str(file))
    kind = parquet.schema_arrow.field(column).type
    if not is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise UserError(f"{file}: expected text in the column {column!r}, found {kind}")
    if not parquet.metadata.num_rows:
        raise UserError(f"{file}: expected rows of text, found none")

    def windows() -> Iterator[Window]:
        try:
            for batch in parquet.iter_batches(WINDOW_ROWS):
                yield Window([text or "" for text in batch.column(column).to_pylist()], pa.Table.from_batches([batch]))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: expected a parquet file of UTF-8: {brief(str(error))}") from error

    return windows()


def _check_different(names: list[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{where}: expected columns of different names, found {brief(names)}")


def _check_free(names: Any, where: str) -> None:
    """UserError if the input already has a column that --predict would add."""
    if taken := [name for name in names if name in (LABEL, PROBABILITIES) or str(name).startswith("probability_")]:
        raise UserError(f"{where}: expected no column of the name {taken[0]!r}, which --predict adds")


class Output:
    """Where answers go: JSON lines, or the input's own columns with more of them."""

    def __init__(self, file: Path | None, kind: str, source: Source, label_names: tuple[str, ...]) -> None:
        self.file, self.kind, self.source, self.label_names = file, kind, source, label_names
        self.handle: Any = None
        self.headed = False

    def write(self, window: Window, found: Answers) -> None:
        """Every line whole, in the order of the input, flushed."""
        labels = [None if number < 0 else self.label_names[number] for number in found.labels]
        rounded = np.round(found.probabilities, 6)
        if self.kind == "parquet":
            table = self._with_columns(window.rows, labels, rounded)
            self.handle = self.handle or pq.ParquetWriter(self.file, table.schema)
            with undisturbed():
                self.handle.write_table(table)
            return
        rows = window.rows.to_pylist() if isinstance(window.rows, pa.Table) else window.rows
        lines = self._json(rows, labels, rounded) if self.kind == "json" else self._csv(rows, labels, rounded)
        with undisturbed():
            self.handle = self.handle or (self.file.open("wb") if self.file else sys.stdout.buffer)
            self.handle.write(lines.encode(errors="backslashreplace"))  # half a surrogate pair, as JSON writes it
            self.handle.flush()

    def close(self) -> None:
        if self.file and self.handle:
            self.handle.close()

    def _json(self, rows: list[dict[str, Any]], labels: list[str | None], probabilities: np.ndarray) -> str:
        key = "label" if self.source.kind == "lines" else LABEL
        lines = []
        for row, label, shares in zip(rows, labels, probabilities.tolist(), strict=True):
            named = None if label is None else dict(zip(self.label_names, shares))
            whole = {**row, key: label, PROBABILITIES: named}
            try:
                line = json.dumps(whole, ensure_ascii=False, default=str, allow_nan=False)
            except ValueError:  # JSON has no NaN
                finite = json.loads(json.dumps(whole, default=str), parse_constant=lambda _: None)
                line = json.dumps(finite, ensure_ascii=False)
            lines.append(line + "\n")
        return "".join(lines)

    def _csv(self, rows: list[dict[str, Any]], labels: list[str | None], probabilities: np.ndarray) -> str:
        text = io.StringIO(newline="")
        form = {"delimiter": "\t" if self.kind == "tsv" else ",", "lineterminator": "\n"}
        writer, careful = csv.writer(text, **form), csv.writer(text, quoting=csv.QUOTE_ALL, **form)
        header = next((list(row) for row in rows if row), None)
        if header and not self.headed:
            self.headed = True
            names = [*header, LABEL, *(f"probability_{name}" for name in self.label_names)]
            (careful if "\r" in "".join(names) else writer).writerow(names)
        for row, label, shares in zip(rows, labels, probabilities.tolist(), strict=True):
            added = [""] * (1 + len(shares)) if label is None else [label, *shares]
            returns = any("\r" in str(value) for value in row.values())  # which csv quotes of itself from 3.13 on
            (careful if returns else writer).writerow([*row.values(), *added] if row else [])
        return text.getvalue()

    def _with_columns(self, table: pa.Table, labels: list[str | None], probabilities: np.ndarray) -> pa.Table:
        table = table.append_column(LABEL, pa.array(labels, pa.string()))
        empty = np.array([label is None for label in labels])
        for name, column in zip(self.label_names, probabilities.T):
            table = table.append_column(f"probability_{name}", pa.array(column, pa.float64(), mask=empty))
        return table


def open_output(file: str | None, source: Source, label_names: tuple[str, ...]) -> Output:
    """Standard output or `file`: JSON lines, or what the input is, by its ending. Nothing is created yet."""
    if file is None:
        return Output(None, "json", source, label_names)
    path, own = Path(file), {"lines": (), "json": ()}.get(source.kind, (f".{source.kind}",))
    if path.suffix.lower() not in (".jsonl", *own):
        why = "JSON lines, or the type of the input, whose columns are kept"
        raise UserError(f"--output {file}: expected a file that ends in {' or '.join(('.jsonl', *own))} ({why})")
    if source.file and path.exists() and path.samefile(source.file):
        raise UserError(f"--output {file}: expected another file than --input")
    if not path.parent.is_dir():
        raise UserError(f"--output {file}: expected a folder that exists, found none at {path.parent}")
    if path.exists():
        say(f"warning: --output {file} exists and is written over")
    return Output(path, "json" if path.suffix.lower() == ".jsonl" else source.kind, source, label_names)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the lines at hand are written."""
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])
