"""The six claims this project inherited, as tests, and the rules of their verdicts.

Written down before any study had a result, but for what says when it was added. A claim is taken apart into statements
about cells, each of one whole configuration (fields that are not named have their defaults):
- a difference is supported if it has the claimed sign and p < 0.05 after Holm's correction over every difference of
  this file that the records hold; contradicted if it has the other sign at that level; undecided else, and where a
  cell has one seed;
- a bound on a cost is supported if every seed on every machine keeps it, contradicted if none does, undecided else;
  only runs on one device, with one number of threads and in one precision, are compared (added when the first study
  shared cores between its runs; the precision when a device was one name for two processors; every machine when two
  had as many runs), and runs that shared a machine only where no cell ran alone (added when records began to tell);
- "at similar accuracy" is supported if the whole 95% interval lies within 2 points, contradicted if it lies outside,
  undecided else, and where a cell has one seed.
A claim is contradicted if one of its statements is, supported if all are, undecided else. One that the records lack
cells for is undecided, and says so. In "loses more" a gain counts as a negative loss. Of several encoders, or several
test sets of one name, the one with the most runs is judged, and none of fewer than 200 rows (added when a stray run
could decide which).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import stats
from config import TrainConfig
from grid import identity
from records import PLACES, Cell, timed_alone

SIMILAR = 0.02  # "similar" accuracy: within 2 points
LEVEL = 0.05
METRIC = "precision"  # what the claims were made in
RT, SST2 = "rotten_tomatoes", "sst2"
EPOCHS = {RT: 10, SST2: 5}


def full(lr: float, **more: Any) -> dict[str, Any]:
    return {"mode": "finetune", "lr": lr} | more


def lora(rank: int, alpha: int, lr: float, **more: Any) -> dict[str, Any]:
    return full(lr, peft=True, lora_r=rank, lora_alpha=alpha, **more)


@dataclass(frozen=True)
class Contrast:
    """A sum of weight x mean metric over cells (data set, fields of its config) is claimed to be above 0."""

    text: str
    parts: tuple[tuple[int, str, dict[str, Any]], ...]

    @property
    def paired(self) -> bool:
        return len({data for _, data, _ in self.parts}) == 1


@dataclass(frozen=True)
class Bound:
    """A ratio of costs, or a cost, of a cell against another's is claimed to lie within [low, high]."""

    text: str
    cell: tuple[str, dict[str, Any]]
    against: tuple[str, dict[str, Any]] | None
    cost: Callable[[dict[str, Any]], float | None]
    low: float
    high: float


@dataclass(frozen=True)
class Similar:
    """Two cells are claimed to be equally accurate, within SIMILAR."""

    text: str
    cells: tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Claim:
    number: int
    text: str
    statements: tuple[Contrast | Bound | Similar, ...]
    command: str


def _beats(name: str, data: str, better: dict[str, Any], worse: dict[str, Any]) -> Contrast:
    return Contrast(name, ((1, data, better), (-1, data, worse)))


def _time(facts: dict[str, Any]) -> float:
    return facts["train_seconds"]


def _memory(facts: dict[str, Any]) -> float | None:
    """None for records of GPUs from before the loaded model was what its weights take."""
    before = facts["memory_before_training_bytes"]
    return None if before is None else facts["peak_memory_bytes"] - before


def _trained(facts: dict[str, Any]) -> float:
    return facts["trainable_parameters"]


def _cheaper(rank: int, alpha: int, lr: float) -> tuple[Contrast | Bound | Similar, ...]:
    mine, whole = (RT, lora(rank, alpha, lr)), (RT, full(2e-5))
    name = f"LoRA r{rank}"
    return (
        Bound(f"{name} takes at most 10% of full's training time", mine, whole, _time, 0, 0.1),
        Bound(f"{name} adds at most 10% of the memory full adds to the loaded model", mine, whole, _memory, 0, 0.1),
        Similar(f"{name} is as accurate as full, within {100 * SIMILAR:.0f} points", (mine, whole)),
        Bound(f"{name} trains about 500k parameters (400k to 600k)", mine, None, _trained, 4e5, 6e5),
    )


_DROP_FULL = ((1, RT, full(2e-5)), (-1, RT, full(2e-4)))


def _steadier(rank: int, alpha: int) -> Contrast:
    drop = ((-1, RT, lora(rank, alpha, 2e-5)), (1, RT, lora(rank, alpha, 2e-4)))
    return Contrast(f"from 2e-5 to 2e-4, full loses more than LoRA r{rank}", _DROP_FULL + drop)


CLAIMS = (
    Claim(
        1,
        "Rotten Tomatoes, full fine-tuning: 2e-5 beats 2e-4",
        (_beats("full 2e-5 beats full 2e-4", RT, full(2e-5), full(2e-4)),),
        "python main.py --sweep experiments/rotten_tomatoes.toml",
    ),
    Claim(
        2,
        "LoRA (r16, 2e-5) beats full fine-tuning, and is the more robust to the learning rate",
        (
            _beats("LoRA r16 2e-5 beats full 2e-5", RT, lora(16, 64, 2e-5), full(2e-5)),
            _steadier(16, 64),
            _steadier(8, 32),
        ),
        "python main.py --sweep experiments/rotten_tomatoes.toml",
    ),
    Claim(
        3,
        "Rotten Tomatoes: r16 beats r8",
        (
            _beats("at 2e-5, r16 beats r8", RT, lora(16, 64, 2e-5), lora(8, 32, 2e-5)),
            _beats("at 2e-4, r16 beats r8", RT, lora(16, 64, 2e-4), lora(8, 32, 2e-4)),
        ),
        "python main.py --sweep experiments/rotten_tomatoes.toml",
    ),
    Claim(
        4,
        "SST-2: every LoRA beats full, and r16 is the peak",
        (
            *(_beats(f"LoRA r{r} beats full", SST2, lora(r, 2 * r, 2e-5), full(2e-5)) for r in (8, 16, 32)),
            _beats("r16 beats r8", SST2, lora(16, 32, 2e-5), lora(8, 16, 2e-5)),
            _beats("r16 beats r32", SST2, lora(16, 32, 2e-5), lora(32, 64, 2e-5)),
        ),
        "python main.py --sweep experiments/sst2.toml",
    ),
    Claim(
        5,
        "More data helps: SST-2 scores higher than Rotten Tomatoes",
        (
            Contrast("full scores higher on SST-2", ((1, SST2, full(2e-5)), (-1, RT, full(2e-5)))),
            Contrast("LoRA r16 does", ((1, SST2, lora(16, 32, 2e-5)), (-1, RT, lora(16, 64, 2e-5)))),
            _beats("on SST-2 itself, full gains from all rows over 8,530", SST2, full(2e-5), full(2e-5, limit=8530)),
            _beats("and so does LoRA r16", SST2, lora(16, 32, 2e-5), lora(16, 32, 2e-5, limit=8530)),
        ),
        "python main.py --sweep experiments/sst2.toml",
    ),
    Claim(
        6,
        "Efficient fine-tuning cuts time and memory by over 90% at similar accuracy, with about 500k parameters",
        _cheaper(8, 32, 5e-4) + _cheaper(16, 32, 5e-4),
        "python main.py --sweep experiments/efficiency.toml",
    ),
)


@dataclass(frozen=True)
class Finding:
    """What the records say of one statement."""

    text: str
    verdict: str  # supported, contradicted or undecided
    evidence: str
    seeds: str


def judge(groups: list[list[Cell]], scores: dict[tuple, dict[str, stats.Scores]]) -> dict[int, list[Finding]]:
    """The findings of each claim, by its number. groups: cells by data set; scores: by `Run.key`, then metric.

    Of several groups of one data set the one with the most runs counts, the first of equals.
    """
    cells: dict[str, list[Cell]] = {}
    for group in sorted(subject(groups), key=_size, reverse=True):
        cells.setdefault(data_set(group), group)
    contrasts = [s for claim in CLAIMS for s in claim.statements if isinstance(s, Contrast)]
    measured = {}
    for statement in contrasts:
        chosen = [_find(cells, data, wanted) for _, data, wanted in statement.parts]
        if all(chosen):
            parts = [(weight, scores[cell.first.key][METRIC]) for (weight, _, _), cell in zip(statement.parts, chosen)]
            measured[id(statement)] = stats.contrast(parts, statement.paired)
    corrected = dict(zip(measured, stats.holm([difference.p for difference in measured.values()])))
    found = {}
    for claim in CLAIMS:
        found[claim.number] = [_finding(one, cells, scores, measured, corrected) for one in claim.statements]
    return found


def data_set(group: list[Cell]) -> str:
    """Its name, packaged or not."""
    return group[0].first.data["name"].removesuffix(" (packaged)")


def subject(groups: list[list[Cell]]) -> list[list[Cell]]:
    """The groups that the claims are about: their data sets, with the encoder that has the most runs there. Claims are
    not pieced together from two."""
    encoders: dict[str, list[list[Cell]]] = {}
    for group in groups:
        if data_set(group) in (RT, SST2) and not group[0].few_rows:
            encoders.setdefault(group[0].first.model["fingerprint"], []).append(group)
    return max(encoders.values(), key=lambda some: sum(map(_size, some)), default=[])


def _size(group: list[Cell]) -> int:
    return sum(len(cell.runs) for cell in group)


def verdict(findings: list[Finding]) -> str:
    """Of a claim, from those of its statements."""
    verdicts = {finding.verdict for finding in findings}
    return "contradicted" if "contradicted" in verdicts else "supported" if verdicts == {"supported"} else "undecided"


def _find(cells: dict[str, list[Cell]], data: str, wanted: dict[str, Any]) -> Cell | None:
    """The cell of those fields, all others at their defaults. Where the data set's rows have changed there may be
    several: then the one with the most seeds."""
    sought = _computed(asdict(TrainConfig(epochs=EPOCHS[data], **wanted)))
    fits = [cell for cell in cells.get(data, []) if _computed(cell.first.config) == sought]
    return max(fits, key=lambda cell: len(cell.runs), default=None)


def _computed(config: dict[str, Any]) -> dict[str, Any]:
    """What a cell computes, wherever it found model and data."""
    return {key: value for key, value in identity(config) if key not in (*PLACES, "seed")}


def _finding(
    statement: Contrast | Bound | Similar, cells: dict, scores: dict, measured: dict, corrected: dict
) -> Finding:
    if isinstance(statement, Contrast):
        if id(statement) not in measured:
            return Finding(statement.text, "undecided", "not run", "0")
        return _judge_contrast(statement, measured[id(statement)], corrected[id(statement)])
    if isinstance(statement, Similar):
        chosen = [_find(cells, data, wanted) for data, wanted in statement.cells]
        if not all(chosen):
            return Finding(statement.text, "undecided", "not run", "0")
        parts = [(weight, scores[cell.first.key]["accuracy"]) for weight, cell in zip((1, -1), chosen)]
        return _judge_similar(statement, stats.contrast(parts))
    mine = _find(cells, *statement.cell)
    other = _find(cells, *statement.against) if statement.against else None
    if mine is None or (statement.against and other is None):
        return Finding(statement.text, "undecided", "not run", "0")
    return _judge_bound(statement, mine, other)


def _judge_contrast(statement: Contrast, difference: stats.Difference, p: float) -> Finding:
    said = "supported" if difference.value > 0 else "contradicted"
    if p >= LEVEL or min(difference.seeds) < 2:
        said = "undecided"
    evidence = f"{in_points(difference)}, p {p:.3g} after Holm ({METRIC})"
    return Finding(statement.text, said, evidence, _seeds(difference.seeds))


def _judge_similar(statement: Similar, difference: stats.Difference) -> Finding:
    inside = difference.low >= -SIMILAR and difference.high <= SIMILAR
    outside = difference.low > SIMILAR or difference.high < -SIMILAR
    said = "supported" if inside else "contradicted" if outside else "undecided"
    if min(difference.seeds) < 2:
        said = "undecided"
    return Finding(statement.text, said, f"{in_points(difference)} (accuracy)", _seeds(difference.seeds))


def _judge_bound(statement: Bound, mine: Cell, other: Cell | None) -> Finding:
    if other is None:
        values = [statement.cost(run.facts) for run in mine.runs]
        evidence = f"{float(np.mean(values)):,.0f} parameters"
        return Finding(statement.text, _kept(statement, values), evidence, str(len(values)))
    cells, costs = (mine, other), {}
    for machine in {run.machine for cell in cells for run in (*cell.runs, *cell.repeats)}:
        there = [[statement.cost(run.facts) for run in some.runs] for cell in cells if (some := cell.on(machine))]
        if len(there) == 2 and None not in [*there[0], *there[1]]:
            costs[machine] = there
    if not costs:
        return Finding(statement.text, "undecided", "not run on one device", "0")
    ratios, evidence, seeds = [], [], []
    for machine in timed_alone(costs):
        base = float(np.mean(costs[machine][1]))
        here = [cost / base for cost in costs[machine][0]]
        spread = f" ({min(here):.0%} to {max(here):.0%})" if len(here) > 1 else ""
        evidence.append(f"{float(np.mean(here)):.0%} of full's{spread} on {machine}")
        seeds.append(_seeds(tuple(map(len, costs[machine]))))
        ratios += here
    return Finding(statement.text, _kept(statement, ratios), "; ".join(evidence), "; ".join(dict.fromkeys(seeds)))


def _kept(statement: Bound, costs: list[float]) -> str:
    kept = [statement.low <= cost <= statement.high for cost in costs]
    return "supported" if all(kept) else "undecided" if any(kept) else "contradicted"


def in_points(difference: stats.Difference) -> str:
    """`+0.4 points (-0.9 to +1.7)`."""
    value, low, high = (100 * number for number in (difference.value, difference.low, difference.high))
    return f"{value:+z.1f} points ({low:+z.1f} to {high:+z.1f})"


def _seeds(seeds: tuple[int, ...]) -> str:
    return " and ".join(map(str, seeds)) if len(set(seeds)) > 1 else str(seeds[0])
