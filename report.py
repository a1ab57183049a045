"""`--report`: tables, pictures and verdicts, made from the records of finished runs alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, count
from operator import attrgetter
from pathlib import Path

import numpy as np

import analysis
import claims
import plots
import stats
from config import DEFAULT_DATASET, TrainConfig, UserError, say
from grid import plain_name
from records import Cell, export, group_cells, read_runs, timed_alone
from render import Block, Gallery, html, markdown

METRICS = ("accuracy", "precision")


def report(config: TrainConfig) -> None:
    """Write report.md, report.html and the pictures to plots_dir, and the Markdown to stdout; with --export, the
    small records too. Raises UserError where there is no finished run."""
    runs = read_runs([Path(run) for run in config.runs] or [Path(config.output_dir)])
    folder = Path(config.plots_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--plots_dir {folder}: cannot be written: {error.strerror}") from error
    if config.export:
        say(f"wrote {len(export(runs, Path(config.export)))} records to {config.export}")
    groups, repeats = group_cells(runs)
    if repeats:
        say(f"the first run of a cell and seed counts; others, on other machines and for costs: {', '.join(repeats)}")
    blocks = build(groups, folder)
    text = markdown(blocks)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(html(blocks), encoding="utf-8")
    say(f"wrote report.md, report.html and {sum(block.kind == 'picture' for block in blocks)} pictures to {folder}")
    print(text, end="")


def build(groups: list[list[Cell]], folder: Path) -> list[Block]:
    """The whole report; its pictures are drawn into `folder`."""
    scores: dict[tuple, dict[str, stats.Scores]] = {}
    for group in groups:
        scores |= score_cells(group)
    blocks = [Block("heading", "Report", 1), Block("text", HOW_TO_READ)]
    findings = claims.judge(groups, scores)
    if any(finding.evidence != "not run" for some in findings.values() for finding in some):
        blocks += verdict_blocks(findings, claims.subject(groups)[0][0])
    family = [comparisons(group, scores) for group in groups] + [across(groups, scores)]
    corrected = iter(stats.holm([one.difference.p for some in family for one in some]))
    prefixes: list[str] = []
    for group, some in zip(groups, family):
        prefixes.append(_prefix(group, prefixes))
        blocks += group_blocks(group, scores, [(one, next(corrected)) for one in some], Gallery(folder, prefixes[-1]))
    return blocks + across_blocks(list(zip(family[-1], corrected)))


HOW_TO_READ = (
    "Made from saved records by `python main.py --report`. A cell is one configuration; its numbers are means over its "
    "seeds, ± their standard deviation. Intervals are 95%, over seeds and test rows together (one seed: over rows "
    "alone, which says nothing about other seeds). Test rows were scored once a run, at the epoch that validation "
    "chose. Precision is that of the positive class, or the mean over more than two."
)


def score_cells(group: list[Cell]) -> dict[tuple, dict[str, stats.Scores]]:
    """The metrics of each cell, all with the same resampled rows. Keyed by `Run.key`."""
    runs = [run for cell in group for run in cell.runs]
    predicted = np.stack([run.predicted for run in runs])
    found = stats.resample(runs[0].rows.labels, predicted, len(runs[0].data["labels"]))
    done, start = {}, 0
    for cell in group:
        part = slice(start, start + len(cell.runs))
        start = part.stop
        done[cell.first.key] = {
            name: stats.Scores(some.observed[part], some.resampled[:, part], cell.seeded)
            for name, some in found.items()
        }
    return done


def best_cells(cells: Iterable[Cell], name: Callable[[Cell], str] = attrgetter("method")) -> dict[str, Cell]:
    """Each method's best learning rate by mean validation accuracy; with another `name`, the best cell of that."""
    best: dict[str, Cell] = {}
    for cell in cells:
        if (key := name(cell)) not in best or cell.val("accuracy") > best[key].val("accuracy"):
            best[key] = cell
    return best


def _most_accurate(cells: Iterable[Cell]) -> Cell:
    """By mean validation accuracy."""
    return max(cells, key=lambda cell: cell.val("accuracy"))


@dataclass(frozen=True)
class Comparison:
    """`cell` against `reference`, in one metric."""

    cell: Cell
    reference: Cell
    metric: str
    difference: stats.Difference
    mcnemar: float | None  # over the seeds that both have; about accuracy


def comparisons(group: list[Cell], scores: dict[tuple, dict[str, stats.Scores]]) -> list[Comparison]:
    """Each method at its best rate against full fine-tuning at its own (without one, the best of all)."""
    best = best_cells(group)
    top = _most_accurate(best.values())
    reference = _most_accurate([cell for cell in best.values() if cell.first.method == "full"] or [top])
    others = [cell for cell in best.values() if cell is not reference]
    return [compare(cell, reference, metric, scores) for metric in METRICS for cell in others]


def across(groups: list[list[Cell]], scores: dict[tuple, dict[str, stats.Scores]]) -> list[Comparison]:
    """The same method trained on other rows and tested on the same ones, each at its best there, be it by its rate, its
    epochs or its rows: every data set against the one of those rows that has the most runs."""

    def best(group: list[Cell]) -> dict[str, Cell]:
        return best_cells(group, lambda cell: plain_name(cell.first.config))

    tests: dict[tuple[str, str], list[list[Cell]]] = {}
    for group in groups:
        first = group[0].first
        tests.setdefault((first.data["fingerprints"]["test"], first.model["fingerprint"]), []).append(group)
    found = []
    for some in tests.values():
        most = max(some, key=lambda group: sum(len(cell.runs) for cell in group))
        there = best(most)
        pairs = [
            (cell, there[name])
            for group in some
            for name, cell in best(group).items()
            if group is not most and name in there
        ]
        found += [compare(*pair, metric, scores) for pair in pairs for metric in METRICS]
    return found


def compare(cell: Cell, reference: Cell, metric: str, scores: dict[tuple, dict[str, stats.Scores]]) -> Comparison:
    parts = [(1, scores[cell.first.key][metric]), (-1, scores[reference.first.key][metric])]
    return Comparison(cell, reference, metric, stats.contrast(parts), _mcnemar(cell, reference, metric))


def _mcnemar(cell: Cell, reference: Cell, metric: str) -> float | None:
    mine, others = ({run.seed: run for run in some.runs} for some in (cell, reference))
    seeds = sorted(mine.keys() & others.keys())
    if metric != "accuracy" or not seeds:
        return None
    right = [np.stack([some[s].predicted == some[s].rows.labels for s in seeds]) for some in (mine, others)]
    return stats.mcnemar_over_seeds(*right)[0]


def sentence(one: Comparison, p: float) -> str:
    """What a reader can use of a comparison, in one sentence."""
    difference, name = one.difference, one.cell.name
    value, low, high = (100 * number for number in (difference.value, difference.low, difference.high))
    said = (
        f"is not shown to differ from {one.reference.name} in {one.metric}"
        if p >= claims.LEVEL or one.cell.few_rows
        else f"has {'higher' if value > 0 else 'lower'} {one.metric} than {one.reference.name}"
    )
    lone = [c.name for c in (one.cell, one.reference) if len(c.runs) == 1 and c.seeded]
    caveat = f" But {' and '.join(lone)} ran with one seed, which says nothing about others." if lone else ""
    power = ""
    if difference.detectable is not None:
        some, others = difference.seeds
        power = f"with {some} and {others} seeds this set detects {detectable(difference)}; "
    return (
        f"{name} {said} (difference {value:+z.1f}, 95% interval {low:+z.1f} to {high:+z.1f}; "
        f"{power}p {p:.3g} after Holm).{caveat}"
    )


def detectable(difference: stats.Difference) -> str:
    """In points. There is no difference above 100: then the seeds are too few for any."""
    if difference.detectable is None:
        return "unknown"
    return "none (>100)" if difference.detectable > 1 else f"{100 * difference.detectable:.1f}"


def _prefix(group: list[Cell], taken: list[str]) -> str:
    """Nothing for the default data set, whose pictures are plots/loss.png and so on; else the data set's name. Where
    another group has taken that, the encoder behind it, and then a number."""
    name = claims.data_set(group).replace("/", "--")
    prefix = "" if name == DEFAULT_DATASET else f"{name}_"
    longer = f"{prefix}{group[0].first.model['fingerprint'][:6]}_"
    return next(one for one in chain((prefix, longer), (f"{longer}{n}_" for n in count(2))) if one not in taken)


def verdict_blocks(findings: dict[int, list[claims.Finding]], cell: Cell) -> list[Block]:
    """The six claims: a row each, and below it its statements."""
    rows = []
    for claim in claims.CLAIMS:
        some = findings[claim.number]
        rows.append((f"**{claim.number}**", claim.text, f"**{claims.verdict(some)}**", "", "", f"`{claim.command}`"))
        rows += [("", finding.text, finding.verdict, finding.evidence, finding.seeds, "") for finding in some]
    text = (
        f"About {cell.first.model['name']}, and no other encoder. The rules, and when each was made: `claims.py`. "
        "To repeat a study with DistilBERT: its command with `--model distilbert-base-uncased`."
    )
    head = ("", "claim", "verdict", "evidence", "seeds", "command")
    return [Block("heading", "Verdicts", 2), Block("text", text), Block("table", head=head, rows=tuple(rows))]


def group_blocks(
    group: list[Cell],
    scores: dict[tuple, dict[str, stats.Scores]],
    compared: list[tuple[Comparison, float]],
    draw: Gallery,
) -> list[Block]:
    """All that is said about one data set and one encoder."""
    data, model = group[0].first.data, group[0].first.model
    best = best_cells(group)
    top = _most_accurate(best.values())
    devices = ", ".join(sorted({run.machine for c in group for run in c.runs}))
    drawn = sorted({run.data["rows"]["train"] for cell in group for run in cell.runs})
    rows = " / ".join([" or ".join(f"{n:,}" for n in drawn), *(f"{data['rows'][s]:,}" for s in ("validation", "test"))])
    about = (
        f"{rows} rows (train / validation / test; test fingerprint {data['fingerprints']['test'][:12]}), classes "
        f"{', '.join(data['labels'])}. Ran on: {devices}. Best cell by validation accuracy: {top.name}."
    )
    warnings = list(dict.fromkeys(note for cell in group for run in cell.runs for note in run.data.get("notes", ())))
    warnings = [note for note in warnings if note.startswith("warning: ")]
    if group[0].few_rows:
        warnings.append("warning: too few test rows to tell methods apart: intervals by resampling are too short here")
    return [
        Block("heading", f"{data['name']}, {model['name']}", 2),
        Block("text", about),
        *(Block("text", f"**{note[0].upper()}{note[1:]}.**") for note in warnings),
        Block("heading", "Quality", 3),
        quality_table(group, scores),
        draw("loss", plots.curves(best, "val/loss", "validation loss (nats)"), f"Validation loss; {BAND}"),
        draw("precision", plots.curves(best, "val/precision", "validation precision"), f"Validation precision; {BAND}"),
        *comparison_blocks(compared, draw),
        *cost_blocks(group, scores, draw),
        *analysis_blocks(best, top, draw),
    ]


BAND = "each method at its best rate, mean over seeds, band from the lowest to the highest seed."


def quality_table(group: list[Cell], scores: dict[tuple, dict[str, stats.Scores]]) -> Block:
    head = ("cell", "seeds", "val. accuracy", "at last epoch", "best epoch")
    head += ("test accuracy", "95% interval", "test precision", "95% interval")
    rows = []
    for cell in group:
        epochs = sorted(run.facts["best_epoch"] or 0 for run in cell.runs)
        last = np.mean([run.curve["val/accuracy"][-1] for run in cell.runs])
        row = [cell.name, str(len(cell.runs)), f"{cell.val('accuracy'):.4f}", f"{last:.4f}"]
        row.append("-" if epochs[-1] == 0 else f"{np.median(epochs):g} of {cell.first.config['epochs']}")
        for metric in METRICS:
            got = stats.estimate(scores[cell.first.key][metric])
            row.append(f"{got.mean:.4f}" + ("" if got.sd is None else f" ± {got.sd:.4f}"))
            row.append(f"{got.low:.3f} to {got.high:.3f}")
        rows.append(tuple(row))
    return Block("table", head=head, rows=tuple(rows))


def comparison_blocks(compared: list[tuple[Comparison, float]], draw: Gallery) -> list[Block]:
    """Table, sentences and forest plot; nothing where there is one method."""
    if not compared:
        return []
    text = (
        "Each method at the learning rate that was best for it on validation, against the same reference. p is from "
        "the interval's own draws (seeds and rows), corrected by Holm for all differences of this report outside the "
        "verdicts; McNemar's is exact for each seed, combined as twice the mean, uncorrected, and about these runs "
        "alone. Detectable: the true difference that would be found in 80% of repetitions."
    )
    rows = [(one.cell.name, one.reference.name, *numbers(one, p)) for one, p in compared]
    figure = plots.forest(
        [f"{one.cell.name}, {one.metric}" for one, _ in compared],
        [tuple(100 * number for number in (d.value, d.low, d.high)) for d in (one.difference for one, _ in compared)],
        [p < claims.LEVEL and not one.cell.few_rows for one, p in compared],
        f"points from {compared[0][0].reference.name}",
    )
    caption = "Differences with their 95% intervals; filled where p < 0.05 after Holm's correction."
    return [
        Block("heading", "Comparisons", 3),
        Block("text", text),
        Block("table", head=("cell", "against", *NUMBERS), rows=tuple(rows)),
        Block("list", rows=tuple((sentence(one, p),) for one, p in compared)),
        draw("differences", figure, caption),
    ]


NUMBERS = ("metric", "difference (points)", "95% interval", "p (Holm)", "McNemar", "detectable")


def numbers(one: Comparison, p: float) -> tuple[str, ...]:
    """A row of a table under NUMBERS."""
    got = one.difference
    interval = f"{100 * got.low:+z.1f} to {100 * got.high:+z.1f}"
    mcnemar = "-" if one.mcnemar is None else f"{one.mcnemar:.3g}"
    return one.metric, f"{100 * got.value:+z.1f}", interval, f"{p:.3g}", mcnemar, detectable(got)


def across_blocks(compared: list[tuple[Comparison, float]]) -> list[Block]:
    """Table of what other training rows make of the same test rows; nothing where all sets have their own."""
    if not compared:
        return []

    def named(cell: Cell) -> str:
        return f"{cell.name}, {len(cell.runs)} seed{'s' * (len(cell.runs) > 1)}"

    rows = [
        (one.cell.first.data["name"], named(one.cell), one.reference.first.data["name"], named(one.reference))
        + numbers(one, p)
        for one, p in compared
    ]
    text = "Data sets with the same test rows: the same method, each at its best by its own validation rows."
    return [
        Block("heading", "Other training rows, the same test rows", 2),
        Block("text", text),
        Block("table", head=("trained on", "cell", "against", "cell", *NUMBERS), rows=tuple(rows)),
    ]


def cost_blocks(group: list[Cell], scores: dict[tuple, dict[str, stats.Scores]], draw: Gallery) -> list[Block]:
    """Time, memory, parameters, beside quality; of runs that shared a machine only where none ran alone."""
    devices = timed_alone(run.machine for cell in group for run in (*cell.runs, *cell.repeats))
    # One device for the picture of times: that of the most methods.
    chosen = max(devices, key=lambda name: len({cell.method for cell in group if cell.on(name)}))
    times = [(cell, here.fact("train_seconds")) for cell in group if (here := cell.on(chosen))]
    parameters = [(cell, cell.fact("trainable_parameters")) for cell in group]
    where = f" of those that ran on {chosen}" if len(times) < len(group) else ""
    return [
        Block("heading", "Cost", 3),
        *version_blocks(group, devices),
        cost_table(group, devices),
        cost_picture("time", "training time (s, log scale)", times, where, scores, draw),
        cost_picture("parameters", "trained parameters (log scale)", parameters, "", scores, draw),
    ]


def version_blocks(group: list[Cell], devices: list[str]) -> list[Block]:
    """A sentence where runs on one device are of several versions of this program: some were faster than others."""
    several = []
    for device in devices:
        runs = [run for cell in group for run in (*cell.runs, *cell.repeats) if run.machine == device]
        if len(commits := {run.facts["git_commit"] for run in runs}) > 1:
            several.append(f"{len(commits)} on {device}")
    text = f"These runs are of several versions of this program, whose costs may differ: {'; '.join(several)}."
    return [Block("text", text)] if several else []


def cost_table(group: list[Cell], devices: list[str]) -> Block:
    """A row for each cell on each device that it ran on; the last column names the device where there are several."""
    goal = np.floor(100 * max(cell.val("accuracy") for cell in group) - 1) / 100
    head = (
        "cell",
        "trained parameters",
        "training time (s)",
        "samples/s",
        "peak memory (MB)",
        "added by training (MB)",
    )
    head += (f"s to {goal:.2f} val. accuracy",)
    rows = []
    for cell in filter(None, (cell.on(device) for cell in group for device in devices)):
        peak, before = cell.fact("peak_memory_bytes"), cell.fact("memory_before_training_bytes")
        seconds, filling = cell.fact("train_seconds"), cell.fact("cache_seconds") or 0
        # How much of it filled a cache depends on what earlier runs have left there.
        filled = f" ({filling:,.0f} of it filled a cache)" if filling >= 0.5 else ""
        row = (
            cell.name,
            f"{cell.fact('trainable_parameters'):,.0f}",
            f"{seconds:,.0f}{filled}",
            f"{cell.fact('samples_per_second'):,.0f}",
            f"{peak / 1e6:,.0f}",
            "-" if before is None else f"{(peak - before) / 1e6:,.0f}",
            analysis.time_to(cell, float(goal)),
        )
        rows.append((*row, cell.first.machine) if len(devices) > 1 else row)
    return Block("table", head=(*head, "device") if len(devices) > 1 else head, rows=tuple(rows))


def cost_picture(
    name: str,
    label: str,
    costs: list[tuple[Cell, float]],
    where: str,
    scores: dict[tuple, dict[str, stats.Scores]],
    draw: Gallery,
) -> Block:
    """Test accuracy against one cost of each cell; each method's best rate is named."""
    named = {id(cell) for cell in best_cells(cell for cell, _ in costs).values()}
    spots = []
    for cell, cost in costs:
        got = stats.estimate(scores[cell.first.key]["accuracy"])
        spots.append((cell.method, cell.name, cost, got.mean, got.low, got.high, id(cell) in named))
    caption = f"Test accuracy (95% interval) against {label}; each method's best rate{where} is named."
    return draw(f"accuracy_{name}", plots.against(spots, label), caption)


def analysis_blocks(best: dict[str, Cell], top: Cell, draw: Gallery) -> list[Block]:
    """Where the best cell and the others are wrong."""
    error = plots.calibration_error(top)
    return [
        Block("heading", "Errors", 3),
        draw("calibration", plots.calibration(top), f"{top.name}: expected calibration error {error:.3f}."),
        draw(
            "confusion", plots.confusion(top), f"{top.name}: test rows a run, mean over seeds; share of the true class."
        ),
        Block("text", "Agreement: the share of test rows, mean over all pairs of runs with one of each cell."),
        table_block(analysis.agreement(list(best.values()), top)),
        Block("text", "Test accuracy by length in words and by negation (not, n't, no, never, without, ...)."),
        table_block(analysis.by_kind_of_row(list(best.values()))),
        Block("text", f"The most confident mistakes of {top.name} (row of the test set, from 0)."),
        table_block(analysis.mistakes(top)),
    ]


def table_block(table: analysis.Table) -> Block:
    """A table whose first row is its head."""
    return Block("table", head=table[0], rows=table[1:])
