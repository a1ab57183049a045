"""The command line: what it accepts, what it refuses and how it says so, and how fast it answers."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config import READ_BY, TrainConfig, UserError, build_parser, parse_args

ROOT = Path(__file__).parent.parent
WITH_VALUES = [action for action in build_parser()._actions if action.nargs != 0]
OPTIONS = [option for action in WITH_VALUES for option in action.option_strings if "_" in option]


def refusal(capsys, *words: str) -> str:
    """What `parse_args` says on stderr before it exits with 2."""
    with pytest.raises(SystemExit) as stop:
        parse_args(list(words))
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == ""
    return said.err


def test_the_users_own_command_is_understood():
    words = "--finetune --peft --wandb --epochs 5 --lr 2e-4 --batch_size 16"
    config = parse_args(words.split())
    expected = TrainConfig(mode="finetune", peft=True, wandb=True, epochs=5, lr=2e-4, batch_size=16)
    assert config == expected and config.method == "lora"


def test_defaults_are_the_documented_ones():
    config = parse_args(["--finetune"])
    assert config == TrainConfig()
    assert (config.epochs, config.lr, config.batch_size, config.device) == (3, 2e-5, 16, "auto")
    assert (config.peft, config.wandb, config.comet, config.seed, config.output_dir) == (False, False, None, 42, "runs")
    assert config.model is None and config.dataset is None  # left to the default, which alone may be replaced


@pytest.mark.parametrize(
    ("words", "mode", "method", "runs"),
    [
        ("--finetune", "finetune", "full", ()),
        ("--finetune --peft", "finetune", "lora", ()),
        ("--baseline", "baseline", "baseline", ()),
        ("--report", "report", "full", ()),
        ("--report runs/a runs/b", "report", "full", ("runs/a", "runs/b")),
        ("--sync runs/a", "sync", "full", ("runs/a",)),
        ("--predict runs/a good -- -dull --lr", "predict", "full", ("runs/a",)),
    ],
)
def test_modes(words, mode, method, runs):
    config = parse_args(words.split())
    assert (config.mode, config.method, config.runs) == (mode, method, runs)


def test_resume_alone_says_what_it_goes_with(capsys):
    assert "--resume RUN" in (said := refusal(capsys, "--resume")) and said.count("\n") == 1


def test_texts_behind_two_dashes_may_begin_with_one():
    assert parse_args(["--predict", "runs/a", "good", "--", "-dull", "--lr"]).texts == ("good", "-dull", "--lr")


def test_no_mode_prints_the_help_and_exits_with_2(capsys):
    said = refusal(capsys, "--epochs", "5")
    assert "usage:" in said and "--batch_size" in said
    modes = "--finetune, --baseline, --predict, --merge, --sweep, --report, --sync"
    assert said.splitlines()[-1] == f"error: choose one of {modes}"


@pytest.mark.parametrize(
    "words", ["--finetune --baseline", "--baseline --report", "--report x --finetune", "--report --sync x"]
)
def test_two_modes_are_refused(words, capsys):
    said = refusal(capsys, *words.split())
    first, second = (word for word in words.split() if word.startswith("--"))
    assert said.count("\n") == 1 and f"argument {second}" in said and first in said


@pytest.mark.parametrize("option", OPTIONS)
def test_both_spellings_of_every_flag(option):
    assert len(OPTIONS) > 10
    known = {"--dataset_name": "a-b_c", "--dataset_dir": "a-b_c", "--output_dir": "a-b_c", "--plots_dir": "a-b_c"}
    value = known.get(option, "0.5" if option in ("--lora_dropout", "--warmup_ratio") else "7")
    action = next(action for action in build_parser()._actions if option in action.option_strings)
    value = action.choices[-1] if action.choices else value
    hyphens = option[:2] + option[2:].replace("_", "-")
    mode = [f"--{READ_BY[action.dest][0]}", *(["--peft"] if option.startswith("--lora") else [])]
    parsed = [
        parse_args([*mode, *words])
        for words in ([option, value], [f"{option}={value}"], [hyphens, value], [f"{hyphens}={value}"])
    ]
    assert all(config == parsed[0] for config in parsed)
    assert str(getattr(parsed[0], action.dest)) in (value, f"{value}.0")  # the value keeps its own hyphens


def test_a_switch_has_both_spellings():
    assert parse_args(["--sweep", "x", "--dry-run"]) == parse_args(["--sweep", "x", "--dry_run"])


@pytest.mark.parametrize(
    ("word", "comet"), [("--comet", True), ("--no-comet", False), ("--no_comet", False), (None, None)]
)
def test_comet_is_on_off_or_left_open(word, comet):
    assert parse_args(["--finetune", *([word] if word else [])]).comet is comet


WHOLE, POSITIVE, SHARE = "a whole number", "a number above 0", "a number from 0 to 0.99"
WRONG = [
    *[("epochs", value, WHOLE) for value in ("0", "-1", "1.5", "x", "", "1e3", "nan")],
    *[("batch_size", value, WHOLE) for value in ("0", "-16", "16.0", "many")],
    *[("gradient_accumulation_steps", value, WHOLE) for value in ("0", "-1", "half")],
    *[("lora_r", value, WHOLE) for value in ("0", "-8", "8.5")],
    *[("limit", value, WHOLE) for value in ("0", "-5", "all")],
    *[("max_length", value, WHOLE) for value in ("2", "0", "-1", "long")],
    *[("seed", value, WHOLE) for value in ("-1", "4294967296", "x")],
    *[("lr", value, POSITIVE) for value in ("0", "-1e-5", "nan", "inf", "-inf", "1e999")],
    ("lr", "fast", "a number"),
    *[("lora_alpha", value, POSITIVE) for value in ("0", "-1", "nan", "inf")],
    *[(flag, value, "a number of at least 0") for flag in ("weight_decay", "max_grad_norm") for value in ("-1", "nan")],
    *[(flag, value, SHARE) for flag in ("lora_dropout", "warmup_ratio") for value in ("1", "-0.1", "nan", "1.5")],
    *[("device", value, "auto, cpu, cuda, cuda:N or mps") for value in ("gpu", "cuda:", "cuda:x", "CPU", "cpu\n", "")],
    *[("save_every", value, WHOLE) for value in ("0", "-1", "often")],
    ("on_nan", "raise", "'stop', 'skip'"),
    ("precision", "fp16", "'auto', 'fp32', 'bf16'"),
    *[(flag, "", "a name or a path") for flag in ("dataset", "dataset_dir", "model", "output_dir", "plots_dir")],
    ("project", " ", "a name or a path"),
    ("weight_decay", "50000", "less than 1 / lr"),
]


@pytest.mark.parametrize(("flag", "value", "expected"), WRONG)
def test_a_wrong_value_is_refused_in_one_line(flag, value, expected, capsys):
    said = refusal(capsys, "--finetune", f"--{flag}={value}")
    assert said.count("\n") == 1 and said.startswith("error: ") and said.endswith("\n")
    assert f"--{flag}" in said and expected in said
    number = value in ("nan", "inf", "-inf", "1e999") or value.lstrip("-").replace(".", "").replace("e-5", "").isdigit()
    shown = repr(value) if not number or repr(value) in said else value.replace("1e999", "inf")
    assert shown.replace("-1e-5", "-1e-05") in said


@pytest.mark.parametrize(
    "words",
    [
        "--baseline --peft",
        "--report --peft",
        "--sweep x --peft",
        "--finetune --bogus 1",
        "--finetune stray",
        "--finetune -- stray",
        "--finetune --peft --lora_r 1000000000000000000",
        "--finetune --lr",
        "--finetune --peft=False",
        "--finetune --epoch 3",  # no abbreviations: a flag added later must not change what a command means
        "--finetune --wandb\nyes",
        "--predict ",  # as of --predict "$RUN" where RUN is not set
        "--merge ",
        "--sync ",
        "--sweep ",
        "--report runs/a ",
    ],
)
def test_a_wrong_command_is_refused_in_one_line(words, capsys):
    said = refusal(capsys, *words.split(" "))
    assert said.count("\n") == 1 and any(word.split("\n")[0].split("=")[0] in said for word in words.split(" ")[1:])


def test_config_checks_itself_and_cannot_be_changed():
    with pytest.raises(UserError, match=r"--lr: expected a number above 0, got 0"):
        TrainConfig(lr=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0
    assert hash(TrainConfig()) == hash(TrainConfig())  # holds nothing that can change


def test_a_tilde_that_no_shell_expands_is_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = parse_args(["--finetune", "--output_dir=~/runs", "--dataset=~/train.csv", "--model", "~"])
    assert (config.output_dir, config.dataset) == ("/home/someone/runs", "/home/someone/train.csv")
    assert config.model == TrainConfig(model="/home/someone").model
    assert parse_args(["--merge=~/runs/a"]).runs == ("/home/someone/runs/a",)


def test_a_text_that_begins_with_dashes_is_left_as_it_is():
    texts = ("--well-made but slow-paced", "--- a so-so film ---")
    config = parse_args(["--predict", "run", *texts, "--max-length=9", "--no_comet", "--output-dir", "a-b"])
    assert config.texts == texts
    assert (config.max_length, config.comet, config.output_dir) == (9, False, "a-b")


def test_a_name_that_is_not_utf8_is_refused_since_records_are():
    with pytest.raises(UserError, match="--dataset: expected a name or a path, in UTF-8"):
        TrainConfig(dataset="caf\udce9.csv")


def test_a_user_error_is_one_line_whatever_it_quotes():
    assert str(UserError("no such file: a\nb\r\nc\u2028d")) == "no such file: a b c d"


def test_every_flag_has_a_help_text_and_the_help_shows_defaults():
    shown = build_parser().format_help()
    assert "%%" not in shown
    assert all(action.help for action in build_parser()._actions)
    for field in dataclasses.fields(TrainConfig):
        if field.metadata:
            assert f"--{field.name}" in shown
            if field.default not in (None, False):
                assert f"(default: {field.default})" in " ".join(shown.split())


def test_help_is_quick_and_fits_two_screens():
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    lines = done.stdout.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 110


def test_parsing_imports_nothing_heavy():
    heavy = "torch transformers datasets numpy scipy sklearn pyarrow pandas peft accelerate wandb comet_ml matplotlib"
    code = f"""import sys, main, config
try: main.main(["--finetune", "--lr", "0"])
except SystemExit: pass
print(sorted(set({heavy.split()}) & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--finetune --lora_r 8", "--lora_r goes with --peft"),
        ("--finetune --lora_alpha 32", "--lora_alpha goes with --peft"),  # given, if only its default
        ("--baseline --lora_dropout 0", "--lora_dropout goes with --finetune or --sweep"),
        ("--finetune --output x.csv", "--output goes with --predict"),
        ("--report --output x.md", "--output goes with --predict"),
    ],
)
def test_a_flag_that_the_mode_does_not_read_is_refused_and_says_where_it_belongs(words, says, capsys):
    said = refusal(capsys, *words.split())
    assert said.startswith("error: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--baseline --lr 1e-3", "--lr does nothing here; it goes with --finetune or --sweep"),
        ("--predict RUN x --lr 3", "--lr does nothing here; it goes with --finetune or --sweep"),
        ("--sync RUN --output_dir x", "--output_dir does nothing here; it goes with --finetune or --baseline or"),
        ("--finetune --workers 1", "--workers does nothing here; it goes with --sweep"),
    ],
)
def test_a_flag_that_only_says_how_is_noted_where_it_is_not_read(words, says, capsys):
    parse_args(words.split())
    said = capsys.readouterr().err
    assert said.startswith("note: ") and says in said and said.count("\n") == 1


def test_every_flag_says_which_modes_read_it():
    assert READ_BY.keys() == {field.name for field in dataclasses.fields(TrainConfig) if field.metadata}
    for flags in ("--finetune --peft --lora_r 8", "--sweep x --lora_r 8 --dataset_dir y", "--report --output_dir runs"):
        assert parse_args(flags.split())
