"""Study 4: trained on one data set, tested on the other, without the sentences the two share.

SST-2 is drawn from the reviews of Rotten Tomatoes, so one's test rows are the other's training rows, whole or as
phrases. Two rows share a sentence if, by letters and digits alone, they are equal, or one is a run of at least four
whole words of the other.

    python experiments/transfer.py --dataset_dir DIR --write data
        data/rotten_tomatoes_to_sst2 and data/sst2_to_rotten_tomatoes: the training and validation rows of the first
        that share nothing with the test rows of the second, and these. experiments/transfer.toml trains on them.
    python experiments/transfer.py --dataset_dir DIR runs/rotten_tomatoes runs/sst2
        scores models that were trained on all rows on the test rows that are left without the shared ones, one
        Markdown row a run. Few are left.
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


def shared_rows(tested: list[str], trained: list[str]) -> dict[str, np.ndarray]:
    """For each tested text, whether it is `whole` among the trained ones, holds one as a `part`, or is `within` one.

    Parts are runs of at least FEWEST_WORDS whole words.
    """
    whole = {letters(text) for text in trained} - {""}
    long_enough = {letters(text) for text in trained if len(text.split()) >= FEWEST_WORDS} - {""}
    mine = [letters(text) for text in tested]
    wanted = {text for text, raw in zip(mine, tested) if len(raw.split()) >= FEWEST_WORDS} - {""}
    inside = set()
    for text in trained:
        inside |= wanted.intersection(parts(text))
    return {
        "whole": np.array([text in whole for text in mine]),
        "part": np.array([not long_enough.isdisjoint(parts(text)) for text in tested]),
        "within": np.array([text in inside for text in mine]),
    }


def parts(text: str) -> set[str]:
    """The letters of every run of at least FEWEST_WORDS words."""
    words = [word for word in map(letters, text.split()) if word]
    found = set()
    for start in range(len(words)):
        joined = "".join(words[start : start + FEWEST_WORDS - 1])
        for word in words[start + FEWEST_WORDS - 1 :]:
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
    """A folder of parquet splits for each direction. Returns lines that say what was dropped."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names, lines = ("negative", "positive"), []
    for source, target in OTHER.items():
        place = folder / f"{source}_to_{target}"
        place.mkdir(parents=True, exist_ok=True)
        tested = sets[target].splits["test"]["text"][:]
        for split in ("train", "validation", "test"):
            rows = sets[target if split == "test" else source].splits[split]
            texts, labels = rows["text"][:], np.asarray(rows["label"][:])
            drop = np.zeros(len(texts), bool)
            if split != "test":
                drop = np.logical_or.reduce(list(shared_rows(texts, tested).values()))
                lines.append(f"{place / split}: {drop.sum()} of {len(texts)} rows dropped")
            kept = np.flatnonzero(~drop)
            table = pa.table({"text": [texts[row] for row in kept], "label": [names[labels[row]] for row in kept]})
            pq.write_table(table, place / f"{split}.parquet")
    return lines


def table(folders: list[Path], sets: dict) -> list[str]:
    """The counts of what is shared, and a Markdown row a run."""
    from metrics import score_with_intervals

    lines, keep = [], {}
    for source, target in OTHER.items():
        trained = [text for split in ("train", "validation") for text in sets[source].splits[split]["text"][:]]
        found = shared_rows(sets[target].splits["test"]["text"][:], trained)
        keep[target] = np.flatnonzero(~np.logical_or.reduce(list(found.values())))
        counts = ", ".join(f"{rows.sum()} {kind}" for kind, rows in found.items())
        rows = len(found["whole"])
        lines.append(f"- {target} test rows in {source}'s training and validation rows: {counts}, of {rows}; "
                     f"{len(keep[target])} are left")  # fmt: skip
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
