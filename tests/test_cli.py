"""The command line in a process of its own: with a hub, without one, and how soon it answers."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import standin_hub
from conftest import ROOT, command, read_json, read_lines

ONLINE = {"HF_HUB_OFFLINE": "0"}
QUICK = ("--epochs", "1", "--limit", "64")


@pytest.fixture
def hub(tmp_path):
    standin_hub.fill(tmp_path / "hub")
    with standin_hub.StandInHub(tmp_path / "hub") as running:
        yield running


def test_named_model_and_data_really_come_from_the_hub_then_from_its_cache(hub, tmp_path):
    words = ("--finetune", "--model", "distilbert-base-uncased", "--dataset", "rotten_tomatoes", *QUICK)
    words += ("--output_dir", str(tmp_path / "runs"))
    env = {**ONLINE, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = command(*words, **env)
    assert done.returncode == 0, done.stderr
    asked = " ".join(path for _, path in hub.requests)
    assert "distilbert/distilbert-base-uncased" in asked and "cornell-movie-review-data/rotten_tomatoes" in asked
    (run,) = (tmp_path / "runs").iterdir()
    record = read_json(run / "config.json")
    assert record["model"]["kind"] == record["data"]["kind"] == "hub"
    assert hub.url in record["model"]["source"] and standin_hub.COMMIT in record["model"]["source"]
    assert "packaged" not in done.stderr

    hub.fail_with = 503  # down, but everything is in the cache
    again = command(*words, **env)
    assert again.returncode == 0, again.stderr
    assert (
        read_json(tmp_path / "runs" / f"{run.name}-2" / "result.json")["test"] == read_json(run / "result.json")["test"]
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--model", "no/such-model"), "--model no/such-model"),
        (("--dataset", "no/such-data"), "--dataset no/such-data"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub, tmp_path, tiny_model, tiny_data, words, named):
    local = ("--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes"))
    env = {**ONLINE, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = command("--finetune", *local, *words, "--output_dir", str(tmp_path / "runs"), **env)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and named in line and "Traceback" not in done.stderr


def test_adapters_and_pickles_of_the_hub_are_refused_and_nobody_is_asked_to_convert_them(
    hub, tmp_path, tiny_model, cli
):
    import torch
    from safetensors.torch import load_file

    assert cli("--finetune", "--peft", *QUICK)[0] == 0
    (run,) = cli.runs.iterdir()
    shutil.copytree(run / "model", tmp_path / "hub" / "models" / "me" / "lora")
    shutil.copytree(tiny_model, pickled := tmp_path / "hub" / "models" / "me" / "bin")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    env = {**ONLINE, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    for name, says in (("me/lora", "it is a LoRA run's adapter"), ("me/bin", "expected model.safetensors")):
        words = ("--baseline", "--dataset", "rotten_tomatoes", "--model", name, "--output_dir", str(tmp_path / "no"))
        done = command(*words, **env)
        assert done.returncode == 2 and not (tmp_path / "no").exists()
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith(f"error: --model {name}: {says}") and "Traceback" not in done.stderr
    assert not any("discussions" in path or method == "POST" for method, path in hub.requests)


def test_a_run_needs_nobody_to_read_its_stderr(tmp_path, tiny_model, tiny_data):
    words = [sys.executable, "main.py", "--finetune", *QUICK, "--output_dir", str(tmp_path / "runs")]
    words += ["--model", str(tiny_model), "--dataset", str(tiny_data / "rotten_tomatoes")]
    closed = subprocess.run(["/bin/sh", "-c", 'exec "$0" "$@" 2>&-', *words], cwd=ROOT, check=False)
    (run,) = (tmp_path / "runs").iterdir()
    assert closed.returncode == 0 and (run / "result.json").exists()
    (run / "result.json").unlink()  # what is resumed says other things first
    reading, writing = os.pipe()
    os.close(reading)
    resume = [sys.executable, "main.py", "--resume", str(run)]
    gone = subprocess.run(resume, cwd=ROOT, stderr=writing, check=False)
    wrong = subprocess.run([*resume[:-1], "nowhere"], cwd=ROOT, stderr=writing, check=False)
    os.close(writing)
    assert (gone.returncode, wrong.returncode) == (0, 2) and (run / "result.json").exists()


def test_nothing_is_printed_to_stderr_but_by_say():
    """Which a reader who goes does not end."""
    for path in ROOT.glob("*.py"):
        code = path.read_text(encoding="utf-8").replace(".tqdm.write(text, file=sys.stderr)", "")
        assert path.name == "config.py" or "file=sys.stderr" not in code, path


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
def test_no_hub_and_a_named_model_is_an_error_within_15_seconds(hub, tmp_path, fault):
    url = hub.url if fault == "hangs" else "http://127.0.0.1:9"
    hub.fail_with = "hang"
    started = time.monotonic()
    words = ("--finetune", "--model", "bert-base-uncased", "--output_dir", str(tmp_path / "runs"))
    done = command(*words, **ONLINE, HF_ENDPOINT=url, HF_HOME=str(tmp_path / "home"))
    assert time.monotonic() - started < 15
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: --model bert-base-uncased") and "cannot be reached" in line and url in line


def test_no_hub_and_the_defaults_run_on_the_packaged_encoder_and_reviews(tmp_path):
    """The README's command, cut short: banner, real encoder, real reviews, and their names in every record."""
    words = ("--finetune", *QUICK, "--output_dir", str(tmp_path / "runs"))
    done = command(*words, timeout=240, **ONLINE, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "packaged default" in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    for name in ("config.json", "result.json"):
        record = read_json(run / name)
        assert record["model"]["name"] == "all-MiniLM-L6-v2 (packaged)"
        assert record["data"]["name"] == "rotten_tomatoes (packaged)"
        assert record["data"]["rows"] == {"train": 64, "validation": 1060, "test": 1061}
    assert len(read_lines(run / "predictions.jsonl")) == 1061
    assert "all-MiniLM-L6-v2" in (run / "model" / "README.md").read_text()


def test_named_data_sets_are_looked_for_in_dataset_dir_first(cli, tiny_model, tiny_data):
    words = ("--baseline", "--model", str(tiny_model), "--dataset_dir", str(tiny_data), "--dataset", "sst2")
    code, _, err = cli(*words, dataset=None)
    assert code == 0, err
    (run,) = cli.runs.iterdir()
    assert run.name == "sst2-baseline-seed42"
    data = read_json(run / "config.json")["data"]
    assert data["kind"] == "local" and data["labels"] == ["negative", "positive"]
    assert data["notes"]  # the validation split became the test set


def test_a_model_folder_runs_no_code_of_its_own(cli, tiny_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = read_json(folder / "config.json") | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code, _, err = cli("--baseline", "--model", str(folder))
    assert code == 2 and "Traceback" not in err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("sink", "code", "said"),
    [("| (exec <&-)", 141, ""), ("> /dev/full", 2, "error: [Errno 28] No space left on device\n")],
)
def test_a_reader_who_goes_and_a_full_disk_end_a_listing_quietly(sink, code, said):
    command = f"{sys.executable} main.py --sweep experiments/quick.toml --dry_run {sink}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["/bin/bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (str(code), said)
