"""Memory and rate of a run on many rows beside one on few: `python bench/rows.py [--rows 1000000] [--steps 300]`.

The rows are training texts, each turned round at another word with a number behind; the few are drawn from the many.
Each run is a process of its own, stopped by Ctrl-C behind `--steps` steps.
"""

import argparse
import csv
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
FEW = 10_000


def write_rows(folder: Path, count: int, dataset: str | None) -> list[Path]:
    """(few.csv, many.csv) of FEW and `count` rows."""
    import hub

    hub.go_offline_if_unreachable()
    from data import load_data

    data = load_data(dataset, None, None, 0)
    texts, labels = (data.splits["train"][name][:] for name in ("text", "label"))
    rows = []
    for number in range(count):
        turn, at = divmod(number, len(texts))
        words = texts[at].split()
        first = turn % max(1, len(words))
        rows.append((" ".join([*words[first:], *words[:first], str(turn)]), data.label_names[labels[at]]))
    paths = []
    for name, some in (("few", random.Random(0).sample(rows, FEW)), ("many", rows)):
        paths.append(folder / f"{name}.csv")
        with paths[-1].open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *some])
    return paths


def measure(file: Path, steps: int) -> tuple[int, float, float]:
    """(peak of resident bytes, seconds to the first log line, median samples/s behind the first third)."""
    out = file.with_suffix(".runs")
    command = [sys.executable, str(ROOT / "main.py"), "--finetune", "--no-comet", "--epochs", "1"]
    command += ["--dataset", str(file), "--output_dir", str(out)]
    started, first, peak, lines = time.perf_counter(), 0.0, 0, []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not lines or lines[-1]["step"] < steps):
        time.sleep(0.5)
        if found := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()):
            peak = max(peak, 1024 * int(found[1]))
        for metrics in out.glob("*/metrics.jsonl"):
            lines = [json.loads(line) for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        first = first or (time.perf_counter() - started if lines else 0.0)
    process.send_signal(signal.SIGINT)
    process.wait()
    rates = [line["train/samples_per_second"] for line in lines if steps / 3 < line["step"] <= steps]
    if not rates:
        raise SystemExit(f"the run ended before step {steps}: {' '.join(command)}")
    return peak, first, statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    print("| rows | peak memory (MB) | to the first log line (s) | samples/s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for file, rows in zip(write_rows(Path(folder), args.rows, args.dataset), (FEW, args.rows)):
            peak, first, rate = measure(file, args.steps)
            print(f"| {rows:,} | {peak / 1e6:,.0f} | {first:.1f} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
