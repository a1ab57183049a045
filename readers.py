"""The user's own files -> texts and labels, or one line that names the file, the line, and what was expected there."""

import codecs
import contextlib
import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from config import UserError, first_line

ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TEXT_COLUMNS = ("text", "sentence", "review", "content", "tweet", "comment", "body")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "target")
CHUNK = 10_000  # rows held as Python objects at a time
csv.field_size_limit(2**31 - 1)  # its own limit of 128 KiB is shorter than some texts


class Columns(NamedTuple):
    """The columns the user named; None is looked for by its usual names."""

    text: str | None = None
    label: str | None = None


USUAL = Columns()


def read_file(file: Path, wanted: Columns = USUAL) -> pa.Table:
    """Two columns: the texts (strings), then the labels (as the file has them; strings from text files).

    They are read in pieces, so memory is that of the texts. Raises UserError for anything that is wrong with the file.
    """
    if file.suffix.lower() == ".parquet":
        return _read_parquet(file, wanted)
    pairs = _json_pairs(file, wanted) if file.suffix.lower().startswith(".json") else _csv_pairs(file, wanted)
    names, chunks = next(pairs, ()), []
    while some := list(islice(pairs, CHUNK)):
        columns = (pa.array(column, pa.string()) for column in zip(*some))
        chunks.append(pa.record_batch(dict(zip(names, columns))))
    if not chunks:
        raise UserError(f"{file}: expected rows below the header, found none")
    return pa.Table.from_batches(chunks)


def choose_columns(found: list[str], where: str, wanted: Columns) -> tuple[str, str]:
    """The text and the label column among `found`: those wanted, else by their usual names in any case."""
    text, label = choose_column("text", found, where, wanted.text), choose_column("label", found, where, wanted.label)
    if text == label:
        raise UserError(f"{where}: expected a text and a label column, got {brief(text)} for both")
    return text, label


def choose_column(kind: str, found: list[str], where: str, wanted: str | None, guess: str | None = None) -> str:
    """The column of `kind`, text or label: the one wanted, else `guess` if it is there, else by its usual names."""
    if wanted is None and guess in found:
        wanted = guess
    if wanted is not None:
        if wanted not in found:
            raise UserError(f"{where}: expected the column {wanted!r} (--{kind}_column), found {brief(found)}")
        return wanted
    lowered = {str(name).strip().lower(): name for name in reversed(found)}
    names = TEXT_COLUMNS if kind == "text" else LABEL_COLUMNS
    column = next((lowered[name] for name in names if name in lowered), None)
    if column is None:
        joined = len(found) == 1 and re.search(r"[;,|\t]", str(found[0]))
        hint = "is it comma-separated (.csv) or tab-separated (.tsv)?" if joined else f"name it with --{kind}_column"
        if kind == "label":
            hint += " (rows without labels are for --predict)"
        raise UserError(f"{where}: expected a column {' or '.join(names)}, found {brief(found)}; {hint}")
    return column


def brief(value: Any) -> str:
    """`repr`, which has no line breaks, cut to what fits in a message."""
    whole = repr(value)
    return whole if len(whole) <= 100 else whole[:97] + "..."


def text_lines(handle: BinaryIO, where: str) -> Iterator[str]:
    """The lines of a UTF-8 file, with their ends; only a line feed ends one. UserError where there are only blanks."""
    blank = True
    for number, raw in enumerate(handle, 1):
        try:
            line = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode()
        except UnicodeDecodeError as error:
            found = f"the byte 0x{error.object[error.start]:02x}"
            kind = "utf-16" if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
            hint = f"; convert it, such as by iconv -f {kind} -t utf-8"
            raise UserError(f"{where}, line {number}: expected UTF-8, found {found}{hint}") from error
        if "\0" in line:
            raise UserError(f"{where}, line {number}: expected UTF-8 text, found a NUL byte")
        blank = blank and not line.strip()
        yield line
    if blank:
        raise UserError(f"{where}: expected rows of text, found an empty file")


def open_file(file: Path) -> BinaryIO:
    """Raises UserError where it cannot be opened."""
    try:
        return file.open("rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


def csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells) of each row, the header first; no cells for an empty line. Streams.

    No word, such as NA or null, means a missing value.
    """
    header: list[str] = []
    line = 1
    with open_file(file) as handle:
        lines = text_lines(handle, str(file))
        # A carriage return alone ends a line, too: the files of old spreadsheets.
        pieces = (piece for whole in lines for piece in (io.StringIO(whole, newline="") if "\r" in whole else (whole,)))
        tabs = file.suffix.lower() == ".tsv"
        reader = csv.reader(pieces, delimiter="\t" if tabs else ",", strict=True)
        try:
            for cells in reader:
                header = header or cells
                if cells and len(cells) != len(header):
                    expected = f"{len(header)} columns ({brief(header)[1:-1]})"
                    raise UserError(f"{file}, line {line}: expected {expected}, found {len(cells)}: {brief(cells)}")
                if tabs and any("\t" in cell and "\n" in cell for cell in cells):
                    found = "a tab and a line break inside of quotes"
                    hint = "if quotes are plain characters here, two rows became one: double them, or use CSV or JSON"
                    raise UserError(f"{file}, line {line}: expected one row a line, found {found}; {hint}")
                if header:
                    yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            message = f"{file}, line {line}: expected quotes to be closed and doubled inside: {error}"
            raise UserError(message) from error


def json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line, {} for an empty one, streamed; of one list of objects, (its number, object)."""
    with open_file(file) as handle:
        first = True
        for number, line in enumerate(lines := text_lines(handle, str(file)), 1):
            if first and line.lstrip().startswith("["):
                rows = _parse_json(line + "".join(lines), f"{file}")
                pieces = ((n, f"{file}, row {n}", row) for n, row in enumerate(rows, 1))
                yield from ((n, _object(row, where)) for n, where, row in pieces)
                return
            first = first and not line.strip()
            where = f"{file}, line {number}"
            yield number, _object(_parse_json(line, where), where) if line.strip() else {}


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{where}: expected an object such as {{"text": ..., "label": ...}}, found {brief(row)}')
    return row


def _parse_json(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected JSON, found {brief(content)} ({error})") from error


def _csv_pairs(file: Path, wanted: Columns) -> Iterator[tuple[str, str]]:
    """The names of the two columns, then (text, label) of each row behind the header."""
    rows = csv_rows(file)
    for line, header in rows:
        chosen = choose_columns(header, f"{file}, line {line} (taken as the header)", wanted)
        text, label = map(header.index, chosen)
        yield chosen
        for at, cells in rows:
            if cells == header:
                raise UserError(f"{file}, line {at}: expected one header, found it again: two files in one?")
            if cells:
                yield cells[text], cells[label]


def _json_pairs(file: Path, wanted: Columns) -> Iterator[tuple[str | None, str | None]]:
    """The names of the two columns, chosen as soon as both have been seen, then (text, label) of each object."""
    rows = ((line, row) for line, row in json_rows(file) if row)
    seen: dict[str, None] = {}
    first: list[tuple[int, dict[str, Any]]] = []
    chosen = None
    for line, row in rows:
        first.append((line, row))
        seen |= dict.fromkeys(row)
        with contextlib.suppress(UserError):
            chosen = choose_columns(list(seen), str(file), wanted)
            break
    if not first:
        return
    text_column, label_column = chosen or choose_columns(list(seen), str(file), wanted)
    yield text_column, label_column
    for number, row in chain(first, rows):
        text, label = row.get(text_column), row.get(label_column)
        if not isinstance(text, str | None) or unpaired(text):
            raise UserError(f"{file}, line {number}: expected a text under {text_column!r}, found {brief(text)}")
        if not isinstance(label, str | bool | int | float | None) or unpaired(label):
            expected = f"a name or a whole number under {label_column!r}"
            raise UserError(f"{file}, line {number}: expected {expected}, found {brief(label)}")
        yield text, label if isinstance(label, str | None) else str(label)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def unpaired(value: Any) -> bool:
    r"""Whether it is a string with half a surrogate pair, as JSON's "\ud800": no encoding has it."""
    try:
        return isinstance(value, str) and not value.isascii() and not value.encode()
    except UnicodeEncodeError:
        return True


def _read_parquet(file: Path, wanted: Columns) -> pa.Table:
    try:
        names = choose_columns(pq.read_schema(file).names, str(file), wanted)
        table = pq.read_table(file, columns=list(names), memory_map=True).select(list(names))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: expected a parquet file: {first_line(error)}") from error
    return table
