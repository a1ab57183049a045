"""From labels as files have them to classes 0 .. n-1: what is a class, what is missing, what is refused."""

import math
import re
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from config import UserError
from readers import brief, is_text

NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d*)?", re.ASCII)
MISSING = ("", "nan")  # as labels; the second is what pandas makes of a missing one


def number_classes(
    splits: dict[str, datasets.Dataset], source: str, known_names: tuple[str, ...], notes: list[str]
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...]]:
    """Drop rows without text or label, and number the classes of train 0 .. n-1 in their order.

    Whole numbers, written as 1 or 1.0, keep their order; other labels are names, in that of the alphabet. -1 is the
    hub's mark for 'not published': it counts as missing where the file names its classes or a split has nothing else.
    A class that the other splits have and train has not is an error.
    """
    declared = _declared_names(splits, source)
    texts = {split: _text_column(rows, f"{source} ({split})") for split, rows in splits.items()}
    has_text = {split: _not_blank(column) for split, column in texts.items()}
    columns = {split: rows.data.column("label") for split, rows in splits.items()}
    classes = _published(_classes(columns, has_text, source), declared, source)
    values = sorted(set(classes["train"]) - {None}, key=_place)
    if declared and (strange := [value for value in values if not 0 <= value < len(declared)]):
        raise UserError(f"{source} (train): expected labels from 0 to {len(declared) - 1}, found {strange[0]}")
    for split, found in classes.items():
        if strange := set(found) - {None, *values}:
            expected = f"expected those of train, {brief(values)}"
            raise UserError(f"{source} ({split}): {expected}, found the classes {brief(sorted(strange))}")
    if -1 in values:
        notes.append("warning: -1 is taken for a class; where it means that there is no label, leave that empty")
    ids = {value: number for number, value in enumerate(values)} | {None: -1}
    kept = {}
    for split, found in classes.items():
        numbers = np.array([ids[value] for value in found], np.int64)
        rows = _complete_rows(texts[split], has_text[split], numbers, split, notes)
        if len(rows):
            kept[split] = rows
    if "train" not in kept:
        raise UserError(f"{source} (train): expected rows with a text and a label, found none")
    if not declared and values == list(range(len(known_names))):
        declared = known_names
    names = tuple(declared[value] if declared else str(value) for value in values)
    if declared and (unused := sorted(set(declared) - set(names))):
        notes.append(f"classes without a row are left out: {brief(unused)}")
    if len({name.strip().lower() for name in names}) < len(names):
        notes.append(f"warning: classes that differ in case or blanks alone: {brief(names)}")
    present = np.unique(kept["train"]["label"][:])
    if len(present) < 2:
        raise UserError(f"{source} (train): expected at least two classes, found only {brief(names[present[0]])}")
    return kept, names


def _published(
    classes: dict[str, list[int | str | None]], declared: tuple[str, ...] | None, source: str
) -> dict[str, list[int | str | None]]:
    """`classes` with None in the place of -1, but where -1 stands beside other numbers that have no names: there it is
    a class, such as negative beside 0 and 1. One of train's is one in every split."""
    if declared and any(isinstance(label, str) for some in classes.values() for label in some):
        raise UserError(f"{source}: expected numbers as labels in every split, since train names its classes")
    marks = (-1, "-1", None)  # the second where other splits have words
    unpublished = {split: bool(declared) or set(labels) <= set(marks) for split, labels in classes.items()}
    if not unpublished["train"] and -1 in classes["train"]:
        return classes
    return {
        split: [None if label in marks else label for label in labels] if unpublished[split] else labels
        for split, labels in classes.items()
    }


def _place(value: int | str) -> tuple:
    """To sort by: numbers by their size, names by the alphabet, in which B and b are one letter."""
    return (value.casefold(), value) if isinstance(value, str) else (value,)


def _declared_names(splits: dict[str, datasets.Dataset], source: str) -> tuple[str, ...] | None:
    """The class names that the files carry beside the numbers, as the hub's parquet files do."""
    names = {}
    for split, rows in splits.items():
        names[split] = class_names(rows.features["label"])
        if names[split] and names[split] != names["train"]:
            found = f"found {brief(names['train'])} in train"
            raise UserError(
                f"{source}: expected the same class names in every split, {found}, {brief(names[split])} in {split}"
            )
    return names["train"]


def class_names(feature: Any) -> tuple[str, ...] | None:
    """Those that a column's `datasets` feature carries, if it does."""
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _not_blank(texts: pa.ChunkedArray) -> np.ndarray:
    """[n] bool: whether there is more than white space."""
    return pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(pc.fill_null(texts, ""))), 0).to_numpy()


def _complete_rows(
    texts: pa.ChunkedArray, has_text: np.ndarray, labels: np.ndarray, split: str, notes: list[str]
) -> datasets.Dataset:
    """The rows with a text and a label (not -1); says in `notes` how many were dropped and why."""
    ok = has_text & (labels >= 0)
    table = pa.table({"text": texts, "label": labels})
    if not ok.all():
        reasons = f"{(~has_text).sum()} without text, {(has_text & (labels < 0)).sum()} without label"
        notes.append(f"{split}: dropped {(~ok).sum()} of {len(ok)} rows: {reasons}")
        table = table.filter(ok)
    return datasets.Dataset(table, fingerprint="unused")  # its own would hash every text


def missing_classes(splits: dict[str, datasets.Dataset], names: tuple[str, ...]) -> list[str]:
    """A warning for each split without a row of a class that train has: its scores say nothing of it."""
    present = {split: set(np.unique(rows["label"][:]).tolist()) for split, rows in splits.items()}
    missing = {split: [names[number] for number in sorted(present["train"] - some)] for split, some in present.items()}
    return [f"warning: {split} has no row of the classes {brief(some)}" for split, some in missing.items() if some]


def _text_column(rows: datasets.Dataset, where: str) -> pa.ChunkedArray:
    column = rows.data.column("text")
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (is_text(kind) or pa.types.is_null(kind)):
        raise UserError(f"{where}: expected text in the text column, found {kind}")
    try:
        column.validate(full=True)
        return column.cast(pa.string())
    except pa.ArrowException as error:
        raise UserError(f"{where}: expected UTF-8 in the text column, found {brief(str(error))}") from error


def _classes(
    columns: dict[str, pa.ChunkedArray], has_text: dict[str, np.ndarray], source: str
) -> dict[str, list[int | str | None]]:
    """Each row's class: a whole number, a name, or None where it or the text is missing. One kind in all splits."""
    raw: dict[str, list] = {}
    for split, column in columns.items():
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_nested(kind) or pa.types.is_temporal(kind) or pa.types.is_binary(kind):
            raise UserError(f"{source} ({split}): expected names or whole numbers as labels, found {kind}")
        try:
            column.validate(full=True)
            raw[split] = [label if there else None for label, there in zip(column.to_pylist(), has_text[split])]
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{source} ({split}): expected UTF-8 as labels, found {brief(str(error))}") from error
    distinct = {split: dict.fromkeys(values) for split, values in raw.items()}
    words = {value.strip() for values in distinct.values() for value in values if isinstance(value, str)}
    numeric = all(NUMBER.fullmatch(word) for word in words if word.lower() not in MISSING)
    for split, values in distinct.items():
        for value in values:
            try:
                values[value] = _class(value, numeric)
            except ValueError as error:
                row = raw[split].index(value) + 1
                raise UserError(f"{source} ({split}), row {row}: {error}") from error
    if len({type(value) for values in distinct.values() for value in values.values()} - {type(None)}) > 1:
        distinct = {s: {k: v if v is None else str(v) for k, v in values.items()} for s, values in distinct.items()}
    return {split: [distinct[split][value] for value in values] for split, values in raw.items()}


def _class(label: Any, numeric: bool) -> int | str | None:
    """One label as the file has it -> its class, None if it is missing. `numeric`: words are numbers."""
    if label is None or (isinstance(label, str) and label.strip().lower() in MISSING):
        return None
    if isinstance(label, str) and not numeric:
        return label.strip()
    if isinstance(label, bool):
        return str(label)
    if isinstance(label, int):
        return label
    number = float(label)
    if math.isnan(number):
        return None
    if not number.is_integer():
        raise ValueError(f"expected a name or a whole number as label, found {brief(label)}")
    return int(number)
