"""Study 4: trained on one data set, tested on the other, without the sentences the two share.

SST-2 is drawn from the reviews of Rotten Tomatoes, so one's test rows are the other's training rows, whole or as
phrases. Two rows share a sentence if, by letters and digits alone, they are equal, or one is a run of at least four
whole words of the other. SST-2 has the phrases of a sentence as rows with labels of their own, so a row to train on is
also dropped if it is any run of words of a test row, a single one too.

    python experiments/transfer.py --dataset_dir DIR --write data
        data/rotten_tomatoes_to_sst2 and data/sst2_to_rotten_tomatoes: the training and validation rows of the first
        that share nothing with the test rows of the second, and these. experiments/transfer.toml trains on them.
        data/rotten_tomatoes_and_sst2: the rows of both, tested on Rotten Tomatoes. experiments/best.toml trains on it.
    python experiments/transfer.py --dataset_dir DIR runs/rotten_tomatoes runs/sst2
        counts what is shared, a set's own validation and training rows too, and scores models that were trained on all
        rows on the test rows that are left without the shared ones, one Markdown row a run. Few are left.
"""

import argparse
import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import UserError

OTHER = {"rotten_tomatoes": "sst2", "sst2": "rotten_tomatoes"}
FEWEST_WORDS = 4


def letters(text: str) -> str:
    """Letters and digits alone, in lower case, without accents: the two sets differ in spaces, quotes and brackets."""
    plain = unicodedata.normalize("NFKD", text.lower().replace("-lrb-", " ").replace("-rrb-", " "))
    return re.sub(r"[^a-z0-9]", "", plain)


def shared_rows(mine: list[str], others: list[str], fewest_within: int = FEWEST_WORDS) -> dict[str, np.ndarray]:
    """For each of my texts, whether it is `whole` among the others, holds one as a `part`, or is `within` one.

    Parts are runs of at least FEWEST_WORDS whole words; mine of at least `fewest_within` words may be within others.
    """
    whole = {letters(text) for text in others} - {""}
    long_enough = {letters(text) for text in others if len(text.split()) >= FEWEST_WORDS} - {""}
    keys = [letters(text) for text in mine]
    wanted = {key for key, text in zip(keys, mine) if len(text.split()) >= fewest_within} - {""}
    inside = set()
    for text in others:
        inside |= wanted.intersection(parts(text, fewest_within))
    return {
        "whole": np.array([key in whole for key in keys]),
        "part": np.array([not long_enough.isdisjoint(parts(text, FEWEST_WORDS)) for text in mine]),
        "within": np.array([key in inside for key in keys]),
    }


def parts(text: str, fewest: int) -> set[str]:
    """The letters of every run of at least `fewest` words."""
    words = [word for word in map(letters, text.split()) if word]
    found = set()
    for start in range(len(words)):
        joined = "".join(words[start : start + fewest - 1])
        for word in words[start + fewest - 1 :]:
            joined += word
            found.add(joined)
    return found


def score_run(run: Path, data) -> np.ndarray:
    """[rows, classes] probabilities of the test rows of `data` under the run's saved model."""
    from predict import Predictor, open_saved

    saved = open_saved(str(run), "predict")
    return Predictor(saved, "auto", saved.record["config"]["precision"])(data.splits["test"]["text"][:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders, or folders of run folders")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write data sets to train on, without what is shared")
    parser.add_argument("--dataset_dir", help="look for the data sets here first")
    words = parser.parse_args()
    folders = [
        path.parent for run in words.runs for path in sorted({*run.glob("result.json"), *run.glob("*/result.json")})
    ]
    try:
        sets = load_both(words.dataset_dir)
        print("\n".join(write(sets, words.write) if words.write else table(folders, sets)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load_both(dataset_dir: str | None) -> dict:
    """Both data sets, whole (`data.TextData`)."""
    import hub

    hub.go_offline_if_unreachable()
    from data import load_data

    return {name: load_data(name, dataset_dir, None, 0) for name in OTHER}


def write(sets: dict, folder: Path) -> list[str]:
    """Folders of parquet splits: one for each direction, and the two sets together, tested on Rotten Tomatoes.

    Where both are trained on, SST-2's rows that share a sentence with Rotten Tomatoes' validation rows are dropped too:
    a run is chosen by those. Returns lines that say what was dropped.
    """
    lines = []
    for source, target in OTHER.items():
        place = folder / f"{source}_to_{target}"
        tested, labels = of(sets, target, "test")
        save(place, "test", tested, labels)
        for split in ("train", "validation"):
            texts, labels, line = without(of(sets, source, split), tested)
            save(place, split, texts, labels)
            lines.append(f"{place / split}: {line}")
    place = folder / "rotten_tomatoes_and_sst2"
    held_out = {split: of(sets, "rotten_tomatoes", split) for split in ("validation", "test")}
    for split, rows in held_out.items():
        save(place, split, *rows)
    seen = [text for texts, _ in held_out.values() for text in texts]
    *added, line = without(of(sets, "sst2", "train"), seen)
    lines.append(f"{place / 'train'}: {line} of sst2")
    save(place, "train", *(mine + more for mine, more in zip(of(sets, "rotten_tomatoes", "train"), added)))
    return lines


def of(sets: dict, name: str, split: str) -> tuple[list[str], list[int]]:
    """Texts and labels of a split."""
    rows = sets[name].splits[split]
    return list(rows["text"][:]), list(rows["label"][:])


def without(rows: tuple[list[str], list[int]], seen: list[str]) -> tuple[list[str], list[int], str]:
    """Those of the rows that share no sentence with `seen`, and a line that says how many do."""
    drop = np.logical_or.reduce(list(shared_rows(rows[0], seen, fewest_within=1).values()))
    texts, labels = ([value for value, shared in zip(values, drop) if not shared] for values in rows)
    return texts, labels, f"{drop.sum()} of {len(drop)} rows dropped"


def save(folder: Path, split: str, texts: list[str], labels: list[int]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    names = ("negative", "positive")
    table = pa.table({"text": texts, "label": [names[label] for label in labels]})
    pq.write_table(table, folder / f"{split}.parquet")


def count(mine: list[str], others: list[str]) -> tuple[np.ndarray, str]:
    """Places of the rows that share no sentence with the others, and how many do, in words."""
    found = shared_rows(mine, others)
    left = np.flatnonzero(~np.logical_or.reduce(list(found.values())))
    kinds = ", ".join(f"{rows.sum()} {kind}" for kind, rows in found.items())
    return left, f"{kinds}, of {len(mine)}; {len(left)} are left"


def table(folders: list[Path], sets: dict) -> list[str]:
    """The counts of what is shared, and a Markdown row a run."""
    from metrics import score_with_intervals

    lines, keep = [], {}
    for source, target in OTHER.items():
        train, validation = (of(sets, source, split)[0] for split in ("train", "validation"))
        lines.append(f"- {source} validation rows in its own training rows: {count(validation, train)[1]}")
        keep[target], counts = count(of(sets, target, "test")[0], train + validation)
        lines.append(f"- {target} test rows in {source}'s training and validation rows: {counts}")
    lines += ["", "| run | own test accuracy | tested on | rows left | accuracy (95% over rows) | precision |"]
    lines.append("|---|---|---|---|---|---|")
    for folder in folders:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        source = record["data"]["name"]
        if source not in OTHER or record["method"] == "baseline":
            print(f"left out: {folder} ({source}, {record['method']})", file=sys.stderr)
            continue
        target = OTHER[source]
        rows = keep[target]
        labels = np.asarray(sets[target].splits["test"]["label"][:])[rows]
        got = score_with_intervals(labels, score_run(folder, sets[target])[rows])
        low, high = got["accuracy_interval"]
        lines.append(
            f"| {folder.name} | {record['test']['accuracy']:.4f} | {target} | {len(rows)} "
            f"| {got['accuracy']:.4f} ({low:.3f}-{high:.3f}) | {got['precision']:.4f} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
