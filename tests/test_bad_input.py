"""What a user can get wrong, through the command line: one line, exit code 2, and nothing is left behind."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_lines
from safetensors.numpy import load, save
from test_config import WRONG
from test_data import BASE, JSONL, REFUSED, written

import train
from main import main

QUICK = ("--finetune", "--epochs", "1", "--limit", "32")


def refused(cli, *words: str, expected: tuple[str, ...] | list[str] = (), **options) -> None:
    """Run the command line; it must say in one line what was found and expected, and leave no run folder."""
    code, out, err = cli(*words, **options)
    assert code == 2 and out == "" and "Traceback" not in err
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and len(err) < 608, err
    assert all(part in err for part in expected), err
    assert not cli.runs.exists()


# ---------------------------------------------------------------- values of flags


@pytest.mark.parametrize(("flag", "value", "expected"), WRONG[:1])  # test_config.py has them all
def test_values(cli, flag, value, expected):
    refused(cli, "--finetune", f"--{flag}={value}", expected=(f"--{flag}", expected))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--max_length 100000", ("--max_length", "at most", "got 100000")),
        ("--peft --lora_layers 99", ("--lora_layers", "at most 2", "got 99")),
        ("--lora_layers 1", ("--lora_layers goes with --peft",)),
        ("--limit 1", ("--limit", "two classes", "got 1")),
        ("--device cuda:7", ("--device cuda:7", "no such device")),
        ("--device cuda:99999999999999999999", ("--device", "no such device")),
        ("--device mps", ("--device mps", "no such device")),
    ],
)
def test_values_that_model_data_or_machine_do_not_allow(cli, words, expected):
    refused(cli, *QUICK, *words.split(), expected=expected)


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("case", REFUSED)
def test_files(cli, tmp_path, case):
    name, content, expected = REFUSED[case]
    file = written(tmp_path / name, content)
    refused(cli, *QUICK, "--dataset", str(file), expected=(str(file), *expected))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--dataset ./nowhere.csv", ("./nowhere.csv", "found nothing")),
        ("--dataset nobody/nothing", ("--dataset nobody/nothing", "cannot be reached")),
        ("--dataset imdb --dataset_dir ./nowhere", ("--dataset_dir", "./nowhere")),
        ("--dataset {tmp}/empty", ("empty", "found []")),
        ("--dataset {tmp}/only_test", ("only_test", "found ['test.csv']")),
        ("--dataset {tmp}/mixed", ("mixed", "of one kind, found ['test.csv', 'train.jsonl']")),
        ("--dataset {tmp}/folder.csv", ("folder.csv", "found []")),
        ("--dataset {tmp}/folder_in_it", ("train.csv: cannot be read: Is a directory",)),
    ],
)
def test_places_of_data(cli, tmp_path, words, expected):
    for name in ("empty", "only_test", "mixed", "folder.csv", "folder_in_it/train.csv"):
        (tmp_path / name).mkdir(parents=True)
    written(tmp_path / "only_test" / "test.csv", BASE)
    written(tmp_path / "mixed" / "test.csv", BASE)
    written(tmp_path / "mixed" / "train.jsonl", JSONL)
    refused(cli, *QUICK, *words.format(tmp=tmp_path).split(), expected=expected)


def test_what_is_odd_but_right_is_kept_and_what_was_dropped_is_said(cli, tmp_path):
    """A BOM, texts called NA and null, a line of a megabyte; empty texts; copies across splits; a class not in test."""
    folder = tmp_path / "odd"
    folder.mkdir()
    long = "word " * 220_000
    written(folder / "train.csv", b"\xef\xbb\xbf" + BASE.encode() + f"{long},pos\n,neg\n  ,pos\nno label,\n".encode())
    written(folder / "test.csv", "text,label\nNA,pos\nnull,pos\nNone,pos\ngood film 3,pos\n")
    code, _, err = cli(*QUICK, "--dataset", str(folder))
    assert code == 0, err
    assert "train: dropped 3 of 64 rows: 2 without text, 1 without label" in err
    assert (
        "leakage: 1 of 4 test texts are also in train" in err
        and "warning: test has no row of the classes ['neg']" in err
    )
    (run,) = cli.runs.iterdir()
    assert [row["text"] for row in read_lines(run / "predictions.jsonl")] == ["NA", "null", "None", "good film 3"]


# ---------------------------------------------------------------- model folders


def bytes_of(name: str, change):
    """A fault: the file's bytes after `change`."""

    def fault(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return fault


def weights_of(change):
    """A fault: the weights that `change` makes of the dict of the model's own."""
    return bytes_of("model.safetensors", lambda data: save(change(load(data)), metadata={"format": "pt"}))


def first_words(number: int):
    return weights_of(lambda w: w | {n: w[n][:number] for n in w if n.endswith("embeddings.word_embeddings.weight")})


def settings_with(**values):
    return bytes_of("config.json", lambda data: json.dumps(json.loads(data) | values).encode())


def config_with(old: bytes, new: bytes):
    def changed(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    return bytes_of("config.json", changed)


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def add_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Opens(str(folder / "unpickled"))))


def a_shard_is_missing(folder: Path) -> None:
    names = list(load((folder / "model.safetensors").read_bytes()))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


MODEL_FAULTS = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
    "a pickle alone": (lambda folder: ((folder / "model.safetensors").unlink(), add_pickle(folder)), ["safetensors"]),
    "a missing shard": (a_shard_is_missing, []),
    "empty weights": (bytes_of("model.safetensors", lambda data: b""), []),
    "weights cut in the header": (bytes_of("model.safetensors", lambda data: data[:100]), []),
    "weights cut in half": (bytes_of("model.safetensors", lambda data: data[: len(data) // 2]), []),
    "weights one byte short": (bytes_of("model.safetensors", lambda data: data[:-1]), []),
    "a header of 2**63 bytes": (bytes_of("model.safetensors", lambda data: b"\xff" * 7 + b"\x7f" + data[8:]), []),
    "weights that are a picture": (bytes_of("model.safetensors", lambda data: b"\x89PNG\r\n\x1a\n" * 99), []),
    "weights of another width": (weights_of(lambda w: {n: np.repeat(w[n], 2, -1) for n in w}), ["shapes"]),
    "one weight of another shape": (first_words(-1), ["shapes"]),
    "weights without a layer": (
        weights_of(lambda w: {n: w[n] for n in w if "layer.1." not in n}),
        ["lack", "layer.1"],
    ),
    "weights of something else": (weights_of(lambda w: {"x": np.zeros(3)}), ["lack"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "a config cut": (bytes_of("config.json", lambda data: data[:20]), []),
    "a config that is a list": (bytes_of("config.json", lambda data: b"[1, 2]"), []),
    "a config that is not UTF-8": (bytes_of("config.json", lambda data: b"\xff\xfe"), []),
    "a config of an unknown kind": (settings_with(model_type="nothing"), ["nothing"]),
    "a config of another width": (settings_with(dim=32), ["shapes"]),
    "a width that the heads cannot share": (settings_with(n_heads=3), []),
    "a width that is a word": (settings_with(dim="wide"), []),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("*token*")], ["tokenizer"]),
    "a tokenizer cut": (bytes_of("tokenizer.json", lambda data: data[:30]), ["tokenizer"]),
    "a tokenizer that is a list": (bytes_of("tokenizer.json", lambda data: b"[]"), ["tokenizer"]),
    "a tokenizer of more words than the model has": (
        lambda folder: (settings_with(vocab_size=5)(folder), first_words(5)(folder)),
        ["tokenizer", "5"],
    ),
    "an empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], ["config.json"]),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_model_folders(cli, tiny_model, tmp_path, fault):
    change, expected = MODEL_FAULTS[fault]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    change(folder)
    refused(cli, *QUICK, "--model", str(folder), expected=("--model", *expected))
    assert not (folder / "unpickled").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~nowhere", "nobody/nothing", "no name", "{tmp}/file"])
def test_names_of_models(cli, tmp_path, name):
    (tmp_path / "file").write_text("")
    refused(cli, *QUICK, "--model", name.format(tmp=tmp_path), expected=("--model",))


def test_a_pickle_beside_safetensors_is_not_read(cli, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    add_pickle(folder)
    code, _, err = cli(*QUICK, "--model", str(folder))
    assert code == 0, err
    assert not (folder / "unpickled").exists()


# ---------------------------------------------------------------- folders that are written


@pytest.mark.parametrize(
    ("mode", "where"),
    [
        *[(mode, where) for mode in ("--finetune", "--baseline") for where in ("{tmp}/file", "{tmp}/file/below/it")],
        ("--finetune", "/proc/nothing"),  # a baseline makes its folder last, behind other lines
        ("--finetune", "{tmp}/" + "x" * 300),
    ],
)
def test_output_folders(cli, tmp_path, mode, where):
    if where.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc")
    (tmp_path / "file").write_text("")
    refused(cli, mode, "--output_dir", where.format(tmp=tmp_path), expected=("--output_dir",))
    assert (tmp_path / "file").read_text() == ""


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_data, tmp_path_factory) -> Path:
    words = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"))
    folder = tmp_path_factory.mktemp("made")
    assert main([*QUICK, *words, "--output_dir", str(folder)]) == 0
    return next(folder.iterdir())


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A folder as an unfinished run leaves it, outside the output folder."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "result.json").rename(tmp_path / "run" / "result.away")
    return tmp_path / "run"


RUN_FAULTS = {
    "no config.json": (lambda run: (run / "config.json").unlink(), ["config.json"]),
    "config.json cut": (bytes_of("config.json", lambda data: data[:50]), ["damaged config.json"]),
    "config.json not UTF-8": (bytes_of("config.json", lambda data: b"\xff\xfe"), ["damaged config.json"]),
    "config.json a list": (bytes_of("config.json", lambda data: b"[]"), ["damaged config.json"]),
    "config.json without config": (bytes_of("config.json", lambda data: b"{}"), ["'config'"]),
    "config a list": (bytes_of("config.json", lambda data: b'{"config": []}'), ["config.json"]),
    "a field is strange": (config_with(b'"lr"', b'"rate"'), ["'rate'"]),
    "a field is a word": (config_with(b'"lr": 2e-05', b'"lr": "x"'), ["wrong"]),
    "a field is null": (config_with(b'"epochs": 1', b'"epochs": null'), ["epochs"]),
    "a field is a fraction": (config_with(b'"seed": 42', b'"seed": 4.2'), ["seed"]),
    "a field is a number": (config_with(b'"peft": false', b'"peft": 1'), ["peft"]),
    "a field is out of range": (config_with(b'"epochs": 1', b'"epochs": 0'), ["0"]),
    "a baseline's": (config_with(b'"mode": "finetune"', b'"mode": "baseline"'), []),
    "other data": (config_with(b'"fingerprints"', b'"prints"'), ["its data ", "was", "now it is"]),
    "other model": (config_with(b'"name": "tiny"', b'"name": "x"'), ["its model name was 'x', now it is 'tiny'"]),
    "another engine": (config_with(b'"engine": "', b'"engine": "other '), ["its engine was 'other "]),
    "another precision": (config_with(b'\n  "precision": "', b'\n  "precision": "x'), ["its precision was 'x"]),
    "another length": (config_with(b'\n  "max_length": 512', b'\n  "max_length": 9'), ["its max_length was 9"]),
    "metrics.jsonl a folder": (
        lambda run: ((run / "metrics.jsonl").unlink(), (run / "metrics.jsonl").mkdir()),
        ["metrics.jsonl"],
    ),
}


@pytest.mark.parametrize("fault", RUN_FAULTS)
def test_runs_to_resume(cli, run, finished, fault):
    change, expected = RUN_FAULTS[fault]
    change(run)
    before = sorted(path.name for path in run.iterdir())
    words = ("--resume", str(run), "--output_dir", str(finished.parent))
    refused(cli, *words, expected=("--resume", *expected), dataset=None)
    assert sorted(path.name for path in run.iterdir() if path.name != ".lock") == before


@pytest.mark.parametrize("name", ["nowhere", "{tmp}", "{tmp}/file"])
def test_what_is_no_run_is_not_resumed(cli, run, tmp_path, name):
    (tmp_path / "file").write_text("")
    refused(cli, "--resume", name.format(tmp=tmp_path), expected=("--resume", "config.json"), dataset=None)


def test_resume_alone_without_a_run_of_this_config(cli, run):
    refused(cli, *QUICK, "--resume", expected=("--resume", "no unfinished run of this config"))
    words = ("--lr", "0.5", "--resume", "--output_dir", str(run.parent))  # there is one of another config
    refused(cli, *QUICK, *words, expected=("--resume", "no unfinished run of this config"))


def test_resume_names_the_fields_that_differ(cli, run, finished):
    words = ("--resume", str(run), "--output_dir", str(finished.parent))
    words += ("--lr", "0.5", "--batch_size", "4", "--seed", "7")
    differ = ("lr was 2e-05, given 0.5", "batch_size was 16, given 4", "seed was 42, given 7")
    refused(cli, *words, expected=differ, dataset=None)


def finish(run: Path) -> None:
    (run / "result.away").rename(run / "result.json")


REPORT_FAULTS = {
    "not finished": (lambda run: None, []),
    "result.json cut": (lambda run: (run / "result.json").write_text('{"test": {'), []),
    "result.json not UTF-8": (lambda run: (run / "result.json").write_bytes(b"\xff\xfe"), []),
    "result.json a list": (lambda run: (run / "result.json").write_text("[]"), ["result.json"]),
    "result.json of nothing": (lambda run: (run / "result.json").write_text("{}"), ["result.json"]),
    "no metrics.jsonl": (lambda run: (finish(run), (run / "metrics.jsonl").unlink()), ["metrics.jsonl"]),
    "metrics.jsonl cut": (lambda run: (finish(run), (run / "metrics.jsonl").write_text('{"a": ')), []),
}


@pytest.mark.parametrize("fault", REPORT_FAULTS)
def test_runs_to_report(cli, run, fault):
    change, expected = REPORT_FAULTS[fault]
    change(run)
    refused(cli, "--report", str(run), expected=(str(run), "finished run", *expected), dataset=None)


SYNC_FAULTS = {
    "no metrics.jsonl": (lambda run: (run / "metrics.jsonl").unlink(), ["metrics.jsonl"]),
    "no tracker": (lambda run: None, ["--wandb or --comet"]),
    "config.json cut": (bytes_of("config.json", lambda data: data[:50]), ["cannot be read"]),
    "config.json a list": (bytes_of("config.json", lambda data: b"[]"), ["config.json"]),
    "config.json not UTF-8": (bytes_of("config.json", lambda data: b"\xff\xfe"), ["cannot be read"]),
    "state.json a list": (lambda r: ((r / "wandb").mkdir(), written(r / "wandb/state.json", "[]")), ["state.json"]),
}


@pytest.mark.parametrize("fault", SYNC_FAULTS)
def test_runs_to_sync(cli, run, fault):
    change, expected = SYNC_FAULTS[fault]
    change(run)
    refused(cli, "--sync", str(run), expected=(str(run), *expected), dataset=None)


def test_a_picture_folder_that_is_a_file(cli, run, tmp_path):
    finish(run)
    (tmp_path / "file").write_text("")
    words = ("--report", str(run), "--plots_dir", str(tmp_path / "file"))
    refused(cli, *words, expected=("--plots_dir", "file"), dataset=None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "2.50 gib"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."), "99 bytes"),
        (MemoryError(), None),
    ],
)
def test_too_large_a_batch_is_one_line(cli, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(train, "train", fail)
    code, _, err = cli("--finetune", "--epochs", "1")
    said = f" (tried to allocate {said})" if said else ""
    assert code == 2
    assert err.splitlines()[-1] == f"error: out of memory{said}; try a lower --batch_size or --max_length"


def test_other_errors_of_the_runtime_are_not_hidden(cli, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli("--finetune", "--epochs", "1")
