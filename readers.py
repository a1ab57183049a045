"""The user's own files -> texts and labels, or one line that names the file, the line, and what was expected there."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from config import UserError

ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TEXT_COLUMNS = ("text", "sentence", "review", "content", "tweet", "comment", "body")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "target")
csv.field_size_limit(2**31 - 1)  # its own limit of 128 KiB is shorter than some texts


def read_file(file: Path) -> pa.Table:
    """The columns `text` (strings) and `label` (as the file has them; strings from text files), empty ones as null.

    Raises UserError for anything that is wrong with the file.
    """
    if file.suffix.lower() == ".parquet":
        return _read_parquet(file)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    content = _decode(data, file)
    rows = _json_rows(content, file) if file.suffix.lower().startswith(".json") else _csv_rows(content, file)
    return _two_lists(rows, file)


def choose_columns(found: list[str], where: str) -> tuple[str, str]:
    """The text and the label column among `found`, by their usual names in any case."""
    lowered = {str(name).strip().lower(): name for name in reversed(found)}
    chosen = []
    for names in (TEXT_COLUMNS, LABEL_COLUMNS):
        column = next((lowered[name] for name in names if name in lowered), None)
        if column is None:
            hint = "; is it comma-separated (.csv) or tab-separated (.tsv)?" if len(found) == 1 else ""
            raise UserError(f"{where}: expected a column {' or '.join(names)}, found {brief(found)}{hint}")
        chosen.append(column)
    return chosen[0], chosen[1]


def brief(value: Any) -> str:
    """`repr`, which has no line breaks, cut to what fits in a message."""
    whole = repr(value)
    return whole if len(whole) <= 100 else whole[:97] + "..."


def _decode(data: bytes, file: Path) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.start + (len(data) - len(error.object))  # utf-8-sig counts from behind the BOM
        line = data.count(b"\n", 0, bad) + 1
        raise UserError(f"{file}, line {line}: expected UTF-8, found the byte 0x{data[bad]:02x}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{file}, line {line}: expected UTF-8 text, found a NUL byte")
    if not text.strip():
        raise UserError(f"{file}: expected rows of text and label, found an empty file")
    return text


def _csv_rows(content: str, file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(first line, row) of each row behind the header. No word, such as NA or null, means a missing value."""
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if cells and not header:
                header = cells
                choose_columns(header, f"{file}, line {line}")
            elif cells and len(cells) != len(header):
                expected = f"{len(header)} columns ({brief(header)[1:-1]})"
                raise UserError(f"{file}, line {line}: expected {expected}, found {len(cells)}: {brief(cells)}")
            elif cells:
                yield line, dict(zip(header, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}, line {line}: expected quotes to be closed and doubled inside: {error}") from error


def _json_rows(content: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line; of one list of objects, (its number, object)."""
    if content.lstrip().startswith("["):
        rows = _parse_json(content, f"{file}")
        pieces = ((number, f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
    else:
        lines = ((number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip())
        pieces = (
            (number, f"{file}, line {number}", _parse_json(line, f"{file}, line {number}")) for number, line in lines
        )
    for number, where, row in pieces:
        if not isinstance(row, dict):
            raise UserError(f'{where}: expected an object such as {{"text": ..., "label": ...}}, found {brief(row)}')
        yield number, row


def _parse_json(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected JSON, found {brief(content)} ({error})") from error


def _two_lists(numbered: Iterator[tuple[int, dict[str, Any]]], file: Path) -> pa.Table:
    rows = list(numbered)
    if not rows:
        raise UserError(f"{file}: expected rows below the header, found none")
    text_column, label_column = choose_columns(list(dict.fromkeys(key for _, row in rows for key in row)), str(file))
    texts: list[str | None] = []
    labels: list[str | None] = []
    for line, row in rows:
        text, label = row.get(text_column), row.get(label_column)
        if not isinstance(text, str | None) or _unpaired(text):
            raise UserError(f"{file}, line {line}: expected a text under {text_column!r}, found {brief(text)}")
        if not isinstance(label, str | bool | int | float | None) or _unpaired(label):
            raise UserError(
                f"{file}, line {line}: expected a name or a whole number under {label_column!r}, found {brief(label)}"
            )
        texts.append(text)
        labels.append(label if isinstance(label, str | None) else str(label))
    return pa.table({"text": pa.array(texts, pa.string()), "label": pa.array(labels, pa.string())})


def _unpaired(value: Any) -> bool:
    r"""Whether it is a string with half a surrogate pair, as JSON's "\ud800": no encoding has it."""
    try:
        return isinstance(value, str) and not value.isascii() and not value.encode()
    except UnicodeEncodeError:
        return True


def _read_parquet(file: Path) -> pa.Table:
    try:
        names = choose_columns(pq.read_schema(file).names, str(file))
        table = pq.read_table(file, columns=list(names), memory_map=True).select(list(names))
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file}: expected a parquet file: {reason}") from error
    return table
