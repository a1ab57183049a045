"""Whatever is in a file or on the command line: a right answer or one line. 300 examples each; the profile `long`
(HYPOTHESIS_PROFILE=long) tries 10,000."""

import contextlib
import io
import json
import os
import tempfile
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import BASE, FORMATS, JSONL

from config import TrainConfig, UserError, parse_args
from data import TextData, load_data

settings.register_profile(
    "suite", max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", settings.get_profile("suite"), max_examples=10_000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": [f"good {i}" for i in range(40)], "label": [i % 2 for i in range(40)]})
    pq.write_table(table, sink, row_group_size=20)
    return sink.getvalue()


WHOLE = {
    ".csv": [BASE.encode(), FORMATS["quoted.csv"].encode(), b"text,label\n" + b"a,0\nb,1\n" * 20],
    ".tsv": [BASE.replace(",", "\t").encode()],
    ".jsonl": [JSONL.encode()],
    ".json": [FORMATS["list.json"].encode()],
    ".parquet": [parquet_bytes()],
}
# Pieces that mean something to a reader, and any bytes.
PIECES = st.one_of(
    st.sampled_from(
        [b'"', b"'", b",", b"\t", b";", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]"]
        + [b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"0.5", b"true", b'{"text": "a", "label": 1}\n', b"\\ud800"]
        + [b"text", b"label", b"text,label\n", b"a,pos\n", b",\n", b"\xe2\x80\xa8", b"9" * 400, b"[" * 300]
    ),
    st.sampled_from([b"film", b" ", b"\xc3\xa9", b"NA", b"1"]),
    st.binary(max_size=12),
    st.text(max_size=8).map(lambda text: text.encode("utf-8", "replace")),
)


@st.composite
def changed(draw, whole: st.SearchStrategy[bytes]) -> bytes:
    """A right file with up to three spans, often empty, replaced by pieces."""
    data = draw(whole)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.one_of(st.just(0), st.just(0), st.integers(0, 8), st.integers(0, len(data))))
        data = data[:start] + draw(PIECES) + data[start + length :]
    return data


def content(ending: str) -> st.SearchStrategy[bytes]:
    rows = st.lists(PIECES, max_size=40).map(b"".join)
    return st.one_of(changed(st.sampled_from(WHOLE[ending])), changed(st.sampled_from(WHOLE[ending])), rows)


def check_data(found: TextData) -> None:
    assert set(found.splits) == {"train", "validation", "test"}
    for rows in found.splits.values():
        assert len(rows) and all(isinstance(text, str) and text.strip() for text in rows["text"][:])
        assert set(rows["label"][:]) <= set(range(found.num_classes))
    assert len(set(found.splits["train"]["label"][:])) > 1


def one_line(message: str) -> bool:
    return bool(message) and len(message.splitlines()) == 1 and len(message) < 1000


@pytest.mark.parametrize("ending", WHOLE)
def test_any_file_is_read_or_refused_in_one_line(ending):
    with tempfile.TemporaryDirectory() as folder:
        file, ends = Path(folder, f"f{ending}"), Counter()

        @given(content(ending))
        def check(data: bytes) -> None:
            file.unlink(missing_ok=True)  # the reader's threads may still have the last one mapped
            file.write_bytes(data)
            try:
                found = load_data(str(file), None, None, 0)
            except UserError as error:
                ends["refused"] += 1
                assert str(file) in str(error) and one_line(str(error)), error
            else:
                ends["read"] += 1
                check_data(found)

        check()
        # Else most of a reader was not reached. (A parquet file with any byte changed is hardly ever whole.)
        assert ends["refused"] > 20 and ends["read"] > (1 if ending == ".parquet" else 20), ends


FLAGS = [f"--{spec.name}" for spec in fields(TrainConfig) if spec.metadata]
MODES = ["--finetune", "--baseline", "--report", "--sync", "--bogus", "--no-comet", "--dataset_name", "-x", "--"]
VALUES = st.one_of(
    st.sampled_from(
        ["0", "-1", "1", "2", "nan", "inf", "-inf", "1e-5", "1e400", "", " ", "cpu", "cuda:0", "bf16", "٣"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=10),
)
WORDS = st.lists(
    st.one_of(
        st.sampled_from(FLAGS + MODES),
        VALUES,
        st.tuples(st.sampled_from(FLAGS), VALUES).map("=".join),
    ),
    max_size=6,
)


def parsed(words: list[str]) -> None:
    """A config, the help, or one line and exit code 2."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            assert isinstance(parse_args(words), TrainConfig)
    except SystemExit as stop:
        assert stop.code == 2
        line = said.getvalue().removesuffix("\n").split("\n")[-1]
        assert line.startswith("error: ") and "Traceback" not in said.getvalue()
        assert "usage:" in said.getvalue() or len(said.getvalue().splitlines()) == 1


@given(st.tuples(st.sampled_from(["--finetune", "--baseline", "--bogus"]), WORDS))
def test_any_command_line_is_understood_or_refused_in_one_line(words):
    parsed([words[0], *words[1]])


JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


def test_any_config_of_a_run_is_continued_or_refused_in_one_line():
    right = asdict(TrainConfig())
    with tempfile.TemporaryDirectory() as run:
        file = Path(run, "config.json")

        @given(st.one_of(changed(st.just(json.dumps({"config": right}).encode())), JSON_VALUES, JSON_VALUES), st.data())
        def check(whole, data) -> None:
            if not isinstance(whole, bytes):  # one field has another value
                name = data.draw(st.sampled_from(sorted(right)))
                whole = json.dumps({"config": right | {name: whole}}).encode()
            file.write_bytes(whole)
            parsed(["--resume", run])

        check()
