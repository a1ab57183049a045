"""The README says what the program does."""

import gzip
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import standin_hub
from conftest import ROOT

from config import build_parser
from main import main

README = (ROOT / "README.md").read_text(encoding="utf-8")


def flags_table() -> list[str]:
    """One Markdown row for each flag of --help. `python tests/test_readme.py` prints them."""
    rows = []
    for group in build_parser()._action_groups:
        for action in group._group_actions:
            if action.dest == "help" or group.title == "modes (exactly one)":
                continue
            names = ", ".join(f"`{name}`" for name in action.option_strings)
            rows.append(f"| {names} | {action.help.replace('%%', '%').replace('|', '/')} |")
    return rows


def test_the_table_of_flags_is_that_of_help():
    start = README.index("| flag |")
    table = README[start : README.index("\n\n", start)].splitlines()[2:]
    assert table == flags_table()


def test_every_mode_is_in_the_table_of_modes():
    start = README.index("| mode |")
    table = README[start : README.index("\n\n", start)]
    (modes,) = [group for group in build_parser()._action_groups if group.title == "modes (exactly one)"]
    for action in modes._group_actions:
        assert f"`{action.option_strings[0]}" in table


def test_every_file_is_in_the_table_of_the_code_and_imports_go_down_it():
    lines = README[README.index("## The code") :].splitlines()
    row = {name: number for number, line in enumerate(lines) for name in re.findall(r"`(\w+\.\w+)`", line)}
    assert row.keys() == {path.name for path in ROOT.iterdir() if path.suffix in (".py", ".cpp", ".h")}
    for name, place in row.items():
        code = (ROOT / name).read_text(encoding="utf-8")
        for imported in re.findall(r"^ *(?:from|import) (\w+)", code, flags=re.M):
            assert row.get(f"{imported}.py", math.inf) >= place, f"{name} imports {imported}"


def test_every_command_in_the_readme_parses():
    """Every `... main.py ...` line, but for files and runs that only a reader has."""
    parser, found = build_parser(), re.findall(r"\bmain\.py (--[^\n`|#]+)", README)
    assert len(found) >= 10
    for words in found:
        parser.parse_args(words.split())


def examples() -> list[str]:
    """The lines of the README's code blocks."""
    return [line for block in re.findall(r"^```\n(.*?)^```", README, flags=re.M | re.S) for line in block.splitlines()]


def needs(line: str) -> str | None:
    """What a line needs that a test has not."""
    wanted = {"HOST": "several machines", "pip install": "a fresh environment (.ci/run is one)"}
    return next((reason for word, reason in wanted.items() if word in line), None)


# Other files run what these lines say, with the words of the README or to the same end: not twice.
ELSEWHERE = {
    "torchrun --standalone": "test_distributed.py",
    "accelerate launch": "test_distributed.py",
    "--report experiments/records": "test_report.py",
}


@pytest.fixture
def reader(tmp_path, tiny_model, tiny_data, monkeypatch):
    """reader(line) types a line of the README in a folder with the few files that it takes for granted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")
    for name in ("my_reviews.csv", "new.csv"):
        rows = [f"a {word} film number {number},{label}" for number in range(20) for word, label in WORDS]
        (tmp_path / name).write_text("\n".join(["text,label", *rows, ""]))
    (tmp_path / "reviews.txt.gz").write_bytes(gzip.compress(b"a moving film\n\ndull\n"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    tiny = ["--model", str(tiny_model), "--dataset_dir", str(tiny_data)]  # a default that trains in a second

    def type_in(line: str) -> None:
        if re.search(r"main\.py --(finetune|baseline|sweep)", line):
            line = f"{line} {shlex.join(tiny)}"
        if "--sweep" in line:
            line += " --seed 1"  # both seeds are three more processes
        if re.fullmatch(r"python main\.py [^|>]*", line) and "--push_to_hub" not in line:
            assert main(shlex.split(line)[2:]) == 0
        else:
            online = {**os.environ, "HF_HUB_OFFLINE": "0"}  # `main --predict` here has set it
            subprocess.run(["/bin/bash", "-euo", "pipefail", "-c", line], env=online, check=True, timeout=300)

    with standin_hub.StandInHub(tmp_path / "hub") as hub:
        (tmp_path / "hub").mkdir()
        for name, value in (("ENDPOINT", hub.url), ("HOME", str(tmp_path / "home")), ("TOKEN", "hf_secret")):
            monkeypatch.setenv(f"HF_{name}", value)
        yield type_in


WORDS = (("moving", "good"), ("dull", "bad"))


def test_every_example_of_the_readme_runs(reader, tmp_path):
    lines = [line for line in examples() if not needs(line) and not any(words in line for words in ELSEWHERE)]
    assert len(lines) >= 15
    for line in ["python main.py --finetune", *lines]:
        reader(line)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
    assert "predicted_label" in (tmp_path / "labelled.csv").read_text().splitlines()[0]
    assert (tmp_path / "hub/models/me/my-model/model.safetensors").exists()
    assert (tmp_path / "plots/report.html").exists()


if __name__ == "__main__":
    print("\n".join(flags_table()))
