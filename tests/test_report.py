"""Reports from saved records: the same from run folders as from small records, and with known answers."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import synthetic
from conftest import ROOT, read_json
from PIL import Image

import claims
import plots
import report
from records import export, group_cells, read_lines, read_runs


def test_run_folders_and_their_small_records_give_the_same_report(cli, tmp_path):
    cli("--finetune", "--epochs", "2")
    cli("--finetune", "--epochs", "2", "--seed", "7")
    cli("--finetune", "--peft", "--epochs", "3", "--limit", "64")
    cli("--baseline")
    code, out, err = cli("--report", "--export", str(tmp_path / "records"), dataset=None)
    assert code == 0, err
    for name in (
        "loss",
        "precision",
        "differences",
        "accuracy_time",
        "accuracy_parameters",
        "calibration",
        "confusion",
    ):
        with Image.open(tmp_path / "plots" / f"{name}.png") as picture:
            assert picture.width > 500
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # something is drawn
    rows = re.findall(r"^\| (baseline|full 2e-5|LoRA r16 a32 2e-5) \| (\d) \|", out, flags=re.M)
    assert rows == [("baseline", "1"), ("full 2e-5", "2"), ("LoRA r16 a32 2e-5", "1")]
    assert out == (tmp_path / "plots" / "report.md").read_text()
    records = "".join(path.read_text() for path in (tmp_path / "records").iterdir())
    assert str(tmp_path) not in records  # no path of this machine
    for line in (next(cli.runs.iterdir()) / "predictions.jsonl").read_text().splitlines():
        assert json.loads(line)["text"] not in records

    again, other = tmp_path / "again", ("--plots_dir", str(tmp_path / "again"))
    code, from_records, err = cli("--report", str(tmp_path / "records"), *other, dataset=None)
    assert code == 0, err

    head, mistakes = out.split("The most confident mistakes")
    head_again, mistakes_again = from_records.split("The most confident mistakes")
    assert head == head_again
    shorter = [re.sub(r" \| [^|]* \|$", " |", line) if line.startswith("|") else line for line in mistakes.splitlines()]
    assert shorter == mistakes_again.splitlines()  # the records have no texts: that column is missing

    for path in again.glob("*.png"):
        assert path.read_bytes() == (tmp_path / "plots" / path.name).read_bytes()


@pytest.mark.parametrize("what", ["nothing", "folder"])
def test_without_a_finished_run_it_says_so(cli, tmp_path, what):
    code, _, err = cli("--report", *([str(tmp_path)] if what == "folder" else []), dataset=None)
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def studies():
    return synthetic.study_runs()


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[:100],
        lambda t: t.replace('"format": 1', '"format": 99'),
        lambda t: t.replace('"confidence"', '"c"'),
        lambda t: re.sub(r'"predicted": \[\d,', '"predicted": [', t),  # one prediction less than rows
        lambda t: re.sub(r'"config": .*', '"config": [],', t),
        lambda t: re.sub(r'"val": .*', '"val": {},', t),
        lambda t: t.replace('"peak_memory_bytes"', '"p"'),
        lambda t: re.sub(r'"val/accuracy":\[[^]]*\]', '"val/accuracy":[]', t),
    ],
)
def test_a_damaged_record_is_one_line(cli, tmp_path, studies, damage):
    (path,) = export(studies[:1], tmp_path)
    path.write_text(damage(path.read_text()))
    code, _, err = cli("--report", str(tmp_path), dataset=None)
    assert code == 2 and str(path) in err and len(err.splitlines()) == 1 and "Traceback" not in err


def test_exported_records_read_back_as_they_were(studies, tmp_path):
    export(studies, tmp_path)
    found = {(run.cell, run.seed): run for run in read_runs([tmp_path])}
    assert len(found) == len(studies)
    for run in studies:
        back = found[run.cell, run.seed]
        for name in ("predicted", "confidence"):
            assert (getattr(run, name) == getattr(back, name)).all()
        for name in ("name", "config", "method", "model", "data", "facts", "val", "test", "curve"):
            assert getattr(run, name) == getattr(back, name)
        assert (run.rows.labels == back.rows.labels).all() and (run.rows.negated == back.rows.negated).all()


def test_a_run_again_is_exported_beside_the_one_that_counts(studies, tmp_path):
    first = studies[0]
    again = [replace(first, name=f"{n}", facts=first.facts | {"device": f"machine {n}"}) for n in range(11)]
    assert len(set(export([first, *again, studies[1]], tmp_path))) == 13
    groups, repeats = group_cells(read_runs([tmp_path]))
    assert sorted(repeats) == sorted(run.name for run in again)
    assert first.name in {run.name for group in groups for cell in group for run in cell.runs}


def test_a_line_of_json_may_hold_other_ends_of_lines(tmp_path):
    rows = [{"text": "one\u2028two\u0085three\rfour"}, {"text": "five"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_lines(tmp_path / "rows.jsonl") == rows


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are named in a report and not drawn, which takes most of its time: for tests of its words alone."""
    monkeypatch.setattr(plots, "save_png", lambda *_: None)
    monkeypatch.setattr(plots, "to_svg", lambda *_: "")


@pytest.mark.usefixtures("undrawn")
def test_the_order_of_the_records_does_not_matter(studies, tmp_path):
    def made(runs):
        groups, repeats = group_cells(runs)
        assert not repeats
        return report.markdown(report.build(groups, tmp_path))

    some = [run for run in studies if run.seed < 3]
    assert made(some) == made(some[::-1])


def with_encoder(run, letter, data=None):
    named = {"name": data} if data else {}
    return replace(run, model=run.model | {"fingerprint": letter * 64}, data=run.data | named)


@pytest.mark.usefixtures("undrawn")
def test_each_group_has_pictures_of_its_own(studies, tmp_path):
    some = [run for run in studies if run.seed == 1 and run.data["name"] == "rotten_tomatoes"]
    others = [with_encoder(run, "e") for run in some] + [
        with_encoder(run, "e", "rotten_tomatoes (packaged)") for run in some
    ]
    text = report.markdown(report.build(group_cells([*some, *others])[0], tmp_path))
    pictures = re.findall(r"\]\((\S+\.png)\)", text)
    assert len(pictures) > 10 and len(set(pictures)) == len(pictures)


def test_the_claims_are_judged_by_the_data_they_name(studies):
    other = [with_encoder(run, "e", "ag_news") for run in studies if run.seed == 1]
    assert findings([*other, *studies]) == findings(studies)


def test_a_stray_run_does_not_decide_what_the_claims_are_judged_by(studies):
    """One of another encoder, or of another test set of the same name, whichever sorts first."""
    run = next(run for run in studies if run.data["name"] == "rotten_tomatoes")
    for letter in "0z":
        prints = run.data["fingerprints"] | {"test": letter * 64}
        for stray in (with_encoder(run, letter), replace(run, data=run.data | {"fingerprints": prints})):
            assert findings([stray, *studies]) == findings(studies)


def test_a_baseline_varies_with_the_rows_that_a_limit_draws(studies):
    baseline = next(run for run in studies if run.method == "baseline")
    limited = replace(baseline, config=baseline.config | {"limit": 1000})
    (group,), _ = group_cells([baseline, limited])
    assert [cell.seeded for cell in group] == [False, True]
    assert [scores["accuracy"].seeded for scores in report.score_cells(group).values()] == [False, True]


@pytest.mark.usefixtures("undrawn")
def test_a_picture_is_found_whatever_the_data_set_is_called(studies, tmp_path):
    text = report.markdown(report.build(group_cells([with_encoder(studies[0], "e", "my (old) reviews")])[0], tmp_path))
    assert "](my%20%28old%29%20reviews_loss.png)" in text


def test_a_repeated_cell_and_seed_counts_once(studies):
    _, repeats = group_cells([*studies, replace(studies[0], name="again")])
    assert repeats == ["again"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.ids = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]


def test_the_page_needs_no_other_file_and_its_pictures_follow_its_colours(studies, tmp_path):
    groups, _ = group_cells(studies)
    text = report.html(report.build(groups, tmp_path))
    page = Page(text)
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            assert re.match(r"#|data:", attributes.get(key) or "#"), (tag, attributes[key])
    assert "url(http" not in text and "<script" not in text and "@import" not in text
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(pictures) == 14
    for picture in pictures:
        assert plots.INK not in picture and "currentColor" in picture
        ElementTree.fromstring(picture)  # noqa: S314 - our own
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    assert used <= set(page.ids)
    for name in used:
        assert page.ids.count(name) == 1, name  # a picture never points into another


def test_texts_are_escaped(studies):
    block = report.Block("table", head=("a|b",), rows=(("<b>**x** `y` | z</b>",),))
    assert "&lt;b&gt;<strong>x</strong> <code>y</code> | z&lt;/b&gt;" in report.html([block])
    assert r"a\|b" in report.markdown([block])


def shifted(runs, where, share):
    """The runs that `where` picks made right on another `share` of their wrong rows."""
    import numpy as np

    done = []
    for run in runs:
        predicted = run.predicted.copy()
        if where(run):
            wrong = np.flatnonzero(predicted != run.rows.labels)
            fix = wrong[: int(share * len(wrong))]
            predicted[fix] = run.rows.labels[fix]
        done.append(replace(run, predicted=predicted))
    return done


def findings(runs):
    groups, _ = group_cells(runs)
    scores = {}
    for group in groups:
        scores |= report.score_cells(group)
    return claims.judge(groups, scores)


def verdicts(runs):
    return {number: claims.verdict(some) for number, some in findings(runs).items()}


def test_a_seed_run_again_elsewhere_counts_for_costs_alone(studies):
    def full(run):
        return run.method == "full" and run.data["name"] == "rotten_tomatoes" and run.config["lr"] == 2e-5

    before = findings(studies)
    slow = [run for run in studies if run.seed > 1 or not full(run)]
    (first,) = [run for run in studies if run not in slow and full(run)]
    other = replace(first, facts=first.facts | {"device": "a quick machine"})
    better = replace(first, predicted=first.rows.labels, facts=first.facts | {"train_seconds": 1e9})
    again = findings([*slow, other, better])
    assert again[1] == before[1]  # the run that came first
    assert again[6][0].evidence.startswith("0% of full's") and not before[6][0].evidence.startswith("0%")


@pytest.mark.usefixtures("undrawn")
def test_costs_are_told_for_each_device(studies, tmp_path):
    """Seed 1 ran on a slow machine: it has a row of its own, and no part in the other one's mean."""
    slow = {"device": "a slow machine", "train_seconds": 1e6}
    runs = [replace(run, facts=run.facts | slow) if run.seed == 1 else run for run in studies]
    text = report.markdown(report.build(group_cells(runs)[0], tmp_path))
    rows = [line for line in text.splitlines() if line.startswith("| full 2e-5 |") and "machine" in line]
    assert [row.split(" | ")[-1] for row in rows[:2]] == ["a slow machine, bf16 |", "no machine at all, bf16 |"]
    assert "1,000,000" in rows[0] and "1,000,000" not in rows[1]


@pytest.mark.usefixtures("undrawn")
def test_what_filled_a_cache_is_told_and_is_spent_before_the_first_epoch(studies, tmp_path):
    run = next(run for run in studies if run.config["lora_layers"] == 1)
    filled = replace(run, facts=run.facts | {"train_seconds": 110.0, "cache_seconds": 60.0})
    (cell,) = group_cells([filled])[0][0]
    assert report.analysis.time_to(cell, run.curve["val/accuracy"][0]) == "65"  # 60 and a tenth of 50
    text = report.markdown(report.build([[cell]], tmp_path))
    assert "| 110 (60 of it filled a cache) |" in text


@pytest.mark.usefixtures("undrawn")
def test_runs_that_shared_a_gpu_count_for_costs_only_where_none_ran_alone(studies, tmp_path):
    shared = {"device": "a GPU (14 runs at once)", "memory_before_training_bytes": None}
    for seeds in ((1,), (1, 2, 3, 4, 5)):
        runs = [replace(run, facts=run.facts | shared) if run.seed in seeds else run for run in studies]
        text = report.markdown(report.build(group_cells(runs)[0], tmp_path))
        costs = text.split("### Cost")[1].split("###")[0]
        rows = [line for line in costs.splitlines() if line.startswith("| full 2e-5 |")]
        alone = len(seeds) == 1
        assert len(rows) == 1 and ("| - |" in rows[0]) != alone and "14 runs" not in rows[0]
        assert findings(runs)[6][0].evidence != "not run on one device" or not alone
    assert findings(runs)[6][1].evidence == "not run on one device"  # nobody knows what they added


def test_no_claim_about_costs_rests_on_runs_that_shared_a_machine_where_some_ran_alone(studies):
    """However many these are, and whatever their times would say."""
    shared = {"device": "a GPU (14 runs at once)"}
    quick = {run.name: shared | ({"train_seconds": 1.0} if run.method == "lora" else {}) for run in studies}
    runs = [replace(run, facts=run.facts | quick[run.name]) if run.seed > 1 else run for run in studies]
    alone = findings([run for run in studies if run.seed == 1])
    assert findings(runs)[6][0] == alone[6][0] and alone[6][0].verdict == "contradicted"


def test_claims_are_about_whole_configurations(studies):
    """Shorter runs, or in another precision, are other cells, however many seeds they have."""
    full = [run for run in studies if run.method == "full" and run.config["lr"] == 2e-4]
    for field, value in (("epochs", 1), ("batch_size", 8), ("plain", True)):
        others = [
            replace(run, config=run.config | {field: value, "seed": seed}, predicted=1 - run.rows.labels)
            for run in full
            for seed in (run.seed, run.seed + 100)
        ]
        assert findings([*studies, *others]) == findings(studies)


def test_other_training_rows_of_one_name_are_another_cell(studies):
    """A data set whose training rows have changed since: its runs repeat none, and no mean is made of both."""
    full = [run for run in studies if run.method == "full" and run.config["lr"] == 2e-5 and not run.config["limit"]]
    full = [run for run in full if run.data["name"] == "rotten_tomatoes"]
    prints = full[0].data["fingerprints"] | {"train": "c" * 64}
    later = [replace(run, data=run.data | {"fingerprints": prints}) for run in full[:2]]
    (group,), repeats = group_cells([*full, *later])
    assert not repeats and sorted(len(cell.runs) for cell in group) == [2, 5]
    assert [cell.name for cell in group] == ["full 2e-5 train aaaaaa", "full 2e-5 train cccccc"]
    assert [cell.method for cell in group] == ["full train aaaaaa", "full train cccccc"]
    prints = full[0].data["fingerprints"] | {"validation": "c" * 64}
    later = [replace(run, data=run.data | {"fingerprints": prints}) for run in full[:2]]
    (group,), _ = group_cells([*full, *later])
    assert {cell.method.removeprefix("full train aaaaaa ") for cell in group} == {
        "validation bbbbbb",
        "validation cccccc",
    }


def test_a_method_is_judged_at_its_best_rate_whatever_else_was_tried(studies):
    """Names have more fields where cells would share one: that must not make other methods of the same method's rates.
    Of two rates, both of ten epochs, and one of them of three epochs too, the ten and the three are two methods."""
    full = [run for run in studies if run.method == "full" and run.data["name"] == "rotten_tomatoes"]
    full = [run for run in full if run.config["lr"] in (2e-5, 5e-5)]
    short = [replace(run, config=run.config | {"epochs": 3}) for run in full if run.config["lr"] == 2e-5]
    (group,), _ = group_cells([*full, *short])
    assert [(cell.name, cell.method) for cell in group] == [
        ("full 2e-5 epochs 10", "full epochs 10"),
        ("full 2e-5 epochs 3", "full epochs 3"),
        ("full 5e-5", "full epochs 10"),
    ]
    scores = report.score_cells(group)
    assert {one.reference.method for one in report.comparisons(group, scores)} == {"full epochs 10"}
    odd = [replace(run, config=run.config | {"lr": float(run.seed)}) for run in studies if run.method == "lora"][:2]
    assert len({cell.method for cell in group_cells(odd)[0][0]}) == 1  # 1 and 2: rates without an exponent


@pytest.mark.usefixtures("undrawn")
def test_pictures_of_costs_show_what_they_can(studies, tmp_path, monkeypatch):
    """Parameters depend on no machine; of times, each method's best cell of that machine has its name."""
    drawn = {}

    def against(points, label):
        drawn[label.split(" (")[0]] = points
        return plots.plt.figure()

    monkeypatch.setattr(plots, "against", against)
    some = [run for run in studies if run.data["name"] == "rotten_tomatoes"]
    elsewhere = {"device": "elsewhere"}
    best = report.best_cells(group_cells(some)[0][0])["full"].first.config["lr"]
    moved = [replace(r, facts=r.facts | elsewhere) if r.config.get("lr") == best else r for r in some]
    (group,), _ = group_cells(moved)
    report.build([group], tmp_path)
    plots.plt.close("all")
    assert len(drawn["trained parameters"]) == len(group) > len(drawn["training time"])
    for points in drawn.values():
        assert {point[0] for point in points} == {point[0] for point in points if point[-1]}


def test_three_hundred_classes_are_a_picture_of_the_usual_size(studies):
    run = studies[0]
    labels = np.random.default_rng(0).integers(0, 300, len(run.rows.labels))
    many = replace(run, data=run.data | {"labels": [f"class {n}" for n in range(300)]}, predicted=labels)
    figure = plots.confusion(group_cells([replace(many, rows=replace(run.rows, labels=labels))])[0][0][0])
    assert max(figure.get_size_inches()) <= 8 and not figure.axes[0].texts
    plots.plt.close(figure)


def test_verdicts_follow_their_rules(studies):
    def at(lr, rank=None):
        def picks(run):
            return (
                run.config["lr"] == lr
                and run.config["mode"] == "finetune"
                and (run.config["lora_r"] == rank if run.config["peft"] else rank is None)
            )

        return picks

    assert verdicts(studies)[1] == "undecided"  # the two rates are nearly equal there
    assert verdicts(shifted(studies, at(2e-5), 0.6))[1] == "supported"
    assert verdicts(shifted(studies, at(2e-4), 0.6))[1] == "contradicted"
    assert verdicts(shifted(studies, at(2e-5, 8), 0.6))[3] == "contradicted"  # one part is enough
    one_seed = [run for run in shifted(studies, at(2e-5), 0.6) if run.seed == 1]
    assert verdicts(one_seed)[1] == "undecided"
    assert verdicts(studies)[6] == "contradicted"  # it takes as long as full
    elsewhere = [replace(run, facts=run.facts | {"device": f"{run.method} alone"}) for run in studies]
    assert verdicts(elsewhere)[6] == "contradicted" and findings(elsewhere)[6][0].evidence == "not run on one device"
    cheap = []
    spent = {"train_seconds": 1.0, "peak_memory_bytes": 8.1e8, "trainable_parameters": 500_000}
    for run in studies:
        cheap.append(replace(run, facts=run.facts | spent) if run.method == "lora" else run)
    sixth = verdicts(cheap)[6]
    assert sixth in ("undecided", "supported")  # nothing speaks against it but the width of an interval
    assert verdicts([run for run in studies if run.data["name"] == "sst2"])[1] == "undecided"


def test_a_sentence_says_what_was_found_and_what_could_have_been(studies, tmp_path):
    groups, _ = group_cells(studies)
    (rotten, _) = groups
    some = report.comparisons(rotten, report.score_cells(rotten))
    said = [report.sentence(one, p) for one, p in zip(some, report.stats.holm([one.difference.p for one in some]))]
    assert re.match(
        r"baseline has lower accuracy than full \S+ \(difference -\d+\.\d, 95% interval -\d+\.\d to -\d+\.\d; with 1 "
        r"and 3 seeds this set detects \d\.\d; p [0-9.e-]+ after Holm\)\.",
        said[0],
    )
    assert any("is not shown to differ from full 5e-5 in accuracy" in one for one in said)


def test_the_committed_report_is_that_of_the_committed_records(cli, tmp_path):
    """Letter by letter: every number of the studies can be made again from experiments/records."""
    records, committed = ROOT / "experiments" / "records", ROOT / "experiments" / "report.md"
    code, out, err = cli("--report", str(records), dataset=None)
    assert code == 0, err
    assert out == committed.read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = readme[readme.index("## Results") : readme.index("## Limits")]
    tables = [line for line in results.splitlines() if line.startswith("|")]
    assert tables and set(tables) <= set(out.splitlines())
    prose = " ".join(line for line in results.splitlines() if not line.startswith("|"))
    sentences = [one for one in re.split(r"(?<=\.) ", prose) if "git show" not in one and "--report exp" not in one]
    told = re.findall(r"([+-][\d.]+) to ([+-][\d.]+)(?:, p \.(\d+) after Holm)?", " ".join(sentences))
    assert told
    for low, high, p in told:
        assert f"| {low} to {high} |" + (f" 0.{p}" if p else "") in out
    assert read_json(next(records.glob("**/*.run.json")))["format"] == 1


def test_no_difference_is_above_100_points_and_no_zero_is_negative(studies, tmp_path):
    """Of two seeds one is always right, the other always wrong: the t of two seeds would tell of hundreds of points."""
    two = [run for run in studies if run.seed < 3 and run.data["name"] == "rotten_tomatoes"]
    runs = [replace(run, predicted=run.rows.labels if run.seed == 1 else 1 - run.rows.labels) for run in two]
    text = report.markdown(report.build(group_cells(runs)[0], tmp_path))
    assert "-100.0 to +100.0" in text and "detects none (>100);" in text and "| none (>100) |" in text
    shown = [float(number) for number in re.findall(r"[+-]\d+\.\d", text.replace("e-", "e"))]
    assert shown and max(map(abs, shown)) <= 200  # 200: claim 2's difference of two differences
    assert "-0.0 " not in text
    assert (
        claims.in_points(report.stats.Difference(-1e-9, -0.0004, 0.0, 1.0, 0.1, (2, 2))) == "+0.0 points (+0.0 to +0.0)"
    )


def test_a_report_of_an_unfinished_run_or_of_nothing_says_what_to_do(cli, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    _, _, err = cli("--report", str(tmp_path / "run"), dataset=None)
    assert err.endswith(f"is not a finished run; go on with it: python main.py --resume {tmp_path / 'run'}\n")
    assert f"{tmp_path / 'nope'} does not exist" in cli("--report", str(tmp_path / "nope"), dataset=None)[2]


@pytest.mark.usefixtures("undrawn")
def test_of_few_test_rows_no_difference_is_called_shown(studies, tmp_path):
    """Of 50 rows, all right in one cell and all wrong in another: resampling would be certain."""
    some = [run for run in studies if run.data["name"] == "rotten_tomatoes" and run.seed < 3]
    rows = {name: getattr(some[0].rows, name)[:50] for name in ("labels", "words", "negated")}
    rows = replace(some[0].rows, **rows)
    runs = []
    for run in some:
        wrong = run.method == "lora"
        told = {"predicted": 1 - rows.labels if wrong else rows.labels, "confidence": run.confidence[:50]}
        notes = {"notes": ["warning: leakage: 3 of 50 test texts are also in train", "12 rows held out"]}
        runs.append(replace(run, rows=rows, data=run.data | notes, **told))
    text = report.markdown(report.build(group_cells(runs)[0], tmp_path))
    assert "**Warning: too few test rows" in text and "**Warning: leakage: 3 of 50 test texts" in text
    assert "## Verdicts" not in text
    assert "12 rows held out" not in text and "is not shown to differ" in text and " than full" not in text


def test_a_dollar_in_a_folders_name_is_a_dollar(tmp_path):
    (run := tmp_path / "price_$5_vs_$10.csv").mkdir()
    (run / "metrics.jsonl").write_text('{"epoch": 1, "train/loss": 1.0}\n{"epoch": 1, "val/accuracy": 0.5}\n')
    plots.draw_curves(run, 1)
    assert (run / "curves.png").stat().st_size > 1000


def test_pictures_count_one_seed_leave_room_for_markers_and_have_no_milliseconds(studies):
    import matplotlib.pyplot as plt

    group = group_cells([run for run in studies if run.seed == 1])[0][0]
    full = next(cell for cell in group if cell.first.method == "full")
    assert "(1 seed)" in plots.to_svg(plots.calibration(full), "one")
    (axes,) = plots.curves({"full": full}, "val/loss", "loss").axes
    assert axes.get_xlim()[0] < 1 and axes.get_xlim()[1] > full.first.curve["epoch"][-1]
    points = [("full", "full", x, 0.8, 0.7, 0.9, False) for x in (0.5, 3000.0)]
    ticks = plots.against(points, "s").axes[0].xaxis.get_major_formatter()
    assert [ticks(value) for value in (0.1, 0.5, 1, 1000)] == ["0.1", "0.5", "1", "1k"]
    plt.close("all")


@pytest.mark.usefixtures("undrawn")
def test_other_training_rows_are_compared_on_the_same_test_rows(studies, tmp_path):
    """Even of runs that differ in nothing but the data set."""
    own = [run for run in studies if run.data["name"] == "rotten_tomatoes" and run.method == "full"]
    more = [replace(run, data={**run.data, "name": "more"}, predicted=run.rows.labels.copy()) for run in own]
    more = [run for run in more if run.seed < 3]
    groups, repeats = group_cells(own + more)
    assert len(groups) == 2 and not repeats
    text = report.markdown(report.build(groups, tmp_path))
    table = text.split("## Other training rows, the same test rows")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| more")]
    best = report.best_cells(next(group for group in groups if group[0].first.data["name"] != "more"))["full"]
    gain = 100 * (1 - np.mean([run.test["accuracy"] for run in best.runs]))
    assert [row[4] for row in rows] == ["accuracy", "precision"] and float(rows[0][5]) == round(gain, 1)
    assert rows[0][0] == "more" and rows[0][2] == "rotten_tomatoes" and rows[0][3].startswith(best.name)
    alone, _ = group_cells(own)
    assert "Other training rows" not in report.markdown(report.build(alone, tmp_path))
