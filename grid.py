"""The file of a sweep: a TOML grid -> the runs it stands for, each a checked `TrainConfig`.

seeds = [1, 2, 3]

[defaults]              # flags of every cell
dataset = "rotten_tomatoes"

[[cell]]                # 2 x 3 runs: every combination of the lists, with every seed
method = "lora"
lr = [2e-5, 2e-4]
seeds = [1, 2, 3, 4, 5] # for these cells, instead of those above
"""

import itertools
import tomllib
from collections.abc import Iterable
from dataclasses import Field, asdict, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

from config import READ_BY, TrainConfig, UserError, of_kind, unread

METHODS = {"full": {}, "lora": {"peft": True}, "baseline": {"mode": "baseline"}}
FLAGS = {spec.name: spec for spec in fields(TrainConfig) if spec.metadata}
# Where a run puts things and who else is told: no part of what it computes. `device` neither, so that a cell that
# was run on another machine counts as done; its record names the device.
OF_THE_SWEEP = {"output_dir", "plots_dir", "dry_run", "workers", "ray", "export"}  # not of its runs
NOT_COMPUTED = OF_THE_SWEEP | {"runs", "texts", "given", "resume", "input", "output", "push_to_hub"}
NOT_COMPUTED |= {"wandb", "comet", "project", "save_every", "device"}
NOT_IN_FILE = OF_THE_SWEEP | {"peft", "seed", "resume"}


def read_grid(path: Path, given: dict[str, Any]) -> list[TrainConfig]:
    """Every run of the file once, in its order: table by table, and within a table seed by seed.

    `given` are flags from the command line; they hold for every cell, over the file. Raises UserError, which
    names the file, the cell, the key, what was found and what was expected.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--sweep {path}: expected a TOML file: {error}") from error
    _known_keys(content, {"seeds", "defaults", "cell"}, f"{path}")
    defaults, cells = content.get("defaults", {}), content.get("cell", [])
    if not (isinstance(cells, list) and cells and all(isinstance(cell, dict) for cell in cells)):
        raise UserError(f"{path}: cell: expected at least one [[cell]] table, found {cells!r}")
    if not isinstance(defaults, dict):
        raise UserError(f"{path}: defaults: expected a [defaults] table, found {defaults!r}")
    found: list[TrainConfig] = []
    for number, cell in enumerate(cells, 1):
        where = f"{path}: cell {number}"
        table = {**defaults, **cell}
        table["seeds"] = [given["seed"]] if "seed" in given else table.get("seeds", content.get("seeds"))
        some = _expand(table, {key: value for key, value in given.items() if key != "seed"}, where)
        _refuse_unread(cell, some, f"{where}: ")
        found += some
    _refuse_unread(defaults, found, f"{path}: defaults: ")
    _refuse_unread(given, found, f"{path}: ")
    runs: dict[tuple, TrainConfig] = {}
    for config in found:
        runs.setdefault(identity(asdict(config)), config)
    return list(runs.values())


def _refuse_unread(keys: Iterable[str], configs: list[TrainConfig], where: str) -> None:
    """UserError for a key that none of the runs would read."""
    for key in (key for key in keys if key in READ_BY):
        owners = [unread(key, config.mode, config.peft) for config in configs]
        if all(owners):
            raise UserError(f"{where}--{key} goes with {owners[0]}")


def identity(config: dict[str, Any]) -> tuple:
    """What a run computes, from its config (a `TrainConfig` as a dict, such as config.json holds). Runs of the same
    identity repeat each other. A field that an older record lacks has its default, and so has one that is not read."""
    values = {spec.name: config.get(spec.name, spec.default) for spec in fields(TrainConfig)}
    for name in READ_BY:
        if unread(name, values["mode"], values["peft"]):
            values[name] = FLAGS[name].default
    if values["dataset_dir"]:
        values["dataset_dir"] = str(Path(values["dataset_dir"]).resolve())
    return tuple((key, value) for key, value in values.items() if key not in NOT_COMPUTED)


def cell_names(configs: list[dict[str, Any]], aside: tuple[str, ...] = ("seed",)) -> list[str]:
    """What a reader would call each config, some fields aside: `LoRA r16 a64 5e-4`, with more fields where two that
    differ would have one name."""
    plain = [plain_name(config, "lr" not in aside) for config in configs]
    cells = [{key: value for key, value in identity(config) if key not in aside} for config in configs]
    names = []
    for name, cell in zip(plain, cells):
        alike = [other for other, other_name in zip(cells, plain) if other_name == name]
        vary = [key for key in cell if any(other[key] != cell[key] for other in alike)]
        names.append(" ".join([name, *(f"{key} {cell[key]}" for key in vary if cell[key] is not None)]))
    return names


def plain_name(config: dict[str, Any], with_lr: bool = False) -> str:
    """The method's name, with or without its learning rate: `LoRA r16 a64`."""
    if config["mode"] == "baseline":
        return "baseline"
    lr = f" {Decimal(str(config['lr'])).normalize():e}" if with_lr else ""
    if not config["peft"]:
        return f"full{lr}"
    layers = f" last {config['lora_layers']}" if config.get("lora_layers") else ""
    return f"LoRA r{config['lora_r']} a{config['lora_alpha']:g}{layers}{lr}"


def command_words(config: TrainConfig) -> list[str]:
    """The words after `python main.py` that `parse_args` turns into `config`, but for flags that it does not read."""
    words = [f"--{config.mode}"]
    for name, spec in FLAGS.items():
        value = getattr(config, name)
        if value == spec.default or unread(name, config.mode, config.peft):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name}={value}")
    return words


def _expand(table: dict[str, Any], given: dict[str, Any], where: str) -> list[TrainConfig]:
    """One [[cell]] table, defaults included -> its runs."""
    _known_keys(table, {"method", "seeds", *FLAGS} - NOT_IN_FILE, where)
    seeds = table.pop("seeds")
    if not isinstance(seeds, list) or not seeds:
        raise UserError(f"{where}: seeds: expected a list of whole numbers here or at the top, found {seeds!r}")
    axes = {"seed": [_checked(FLAGS["seed"], seed, where, "seeds") for seed in seeds]}
    for key, value in table.items():
        some = value if isinstance(value, list) else [value]
        if not some:
            raise UserError(f"{where}: {key}: expected a value or a list of values, found an empty list")
        if key == "method":
            wrong = [one for one in some if not isinstance(one, str) or one not in METHODS]
            if wrong:
                raise UserError(f"{where}: method: expected one of {', '.join(METHODS)}, found {wrong[0]!r}")
            axes[key] = some
        else:
            axes[key] = [_checked(FLAGS[key], one, where, key) for one in some]
    found = []
    for values in itertools.product(*axes.values()):
        chosen = {**dict(zip(axes, values)), **given}
        try:
            found.append(TrainConfig(**METHODS[chosen.pop("method", "full")], **chosen))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    return found


def _checked(spec: Field, value: Any, where: str, key: str) -> Any:
    """`value` as the flag's type. UserError if it is of another."""
    options = spec.metadata["options"]
    kind = bool if options.get("switch") else options.get("type", str)
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    if choices := options.get("choices"):
        expected = f"one of {', '.join(choices)}"
    if not of_kind(spec, value):
        raise UserError(f"{where}: {key}: expected {expected}, found {value!r}")
    return float(value) if kind is float else value


def _known_keys(table: dict[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise UserError(f"{where}: {key}: expected one of {', '.join(sorted(known))}, found an unknown key")
