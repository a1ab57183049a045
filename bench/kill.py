"""SIGKILL at random moments: `python bench/kill.py [--processes 2] [--count 30] [--start 0] [--seed 0]`.

Trial N kills a run of path N mod 4 (full, LoRA, frozen prefix, transformers' own modules) at a moment drawn evenly from
its whole time, start-up and end included, and resumes it until it is done. Weights, metrics.jsonl (but times and rates)
and the test metrics must be those of the run that was never stopped, bit for bit. Each trial is one JSON line, appended
to --results, so that the trials can be run in pieces; the last line printed counts all in that file.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = {
    "full": (),
    "lora": ("--peft", "--lr", "5e-4"),
    "prefix": ("--peft", "--lora_layers", "1", "--lr", "1e-3"),
    "plain": ("--plain",),
}
LENGTH = ("--limit", "160", "--epochs", "3", "--batch_size", "8", "--save_every", "3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=0, help="number of the first trial")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "kill", help="runs, caches and data; kept"
    )
    parser.add_argument("--results", type=Path, help="default: WORK/results-PROCESSES.jsonl")
    given = parser.parse_args()
    results = given.results or given.work / f"results-{given.processes}.jsonl"
    given.work.mkdir(parents=True, exist_ok=True)
    write_data(given.work / "reviews")
    for number in range(given.start, given.start + given.count):
        trial = run_trial(number, given.seed, given.processes, given.work)
        print(json.dumps(trial), flush=True)
        with results.open("a") as file:
            file.write(json.dumps(trial) + "\n")
    killed = [line for line in map(json.loads, results.read_text().splitlines()) if line["killed"]]
    print(f"{sum(line['same'] for line in killed)} of {len(killed)} that were killed are the run never stopped")


def write_data(folder: Path) -> None:
    """Splits of the packaged reviews that take seconds, not minutes: 200, 64 and 64 rows."""
    sys.path.insert(0, str(ROOT))
    import packaged

    folder.mkdir(exist_ok=True)
    for split, rows in (("train", 200), ("validation", 64), ("test", 64)):
        lines = (packaged.reviews_folder() / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = random.Random(0).sample(lines, rows)
        (folder / f"{split}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def command(words: tuple[str, ...], processes: int) -> list[str]:
    """One process, or `processes` of them under torchrun on the CPU."""
    if processes == 1:
        return [sys.executable, str(ROOT / "main.py"), *words]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, str(ROOT / "main.py"), *words]


def run(words: tuple[str, ...], processes: int, cache: Path, kill_after: float | None = None) -> tuple[int, float]:
    """(exit code, seconds); the whole process group gets SIGKILL `kill_after` seconds after its start."""
    started = time.monotonic()
    with (cache.parent / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command(words, processes),
            env=os.environ | {"DISTILBERT_SENTIMENT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=kill_after)
        except subprocess.TimeoutExpired:
            kill_all(process.pid)
            code = process.wait()
    return code, time.monotonic() - started


def kill_all(leader: int) -> None:
    """SIGKILL to every process of the session: torchrun gives its workers sessions of their own."""
    os.kill(leader, signal.SIGSTOP)  # so that torchrun tells its workers nothing
    for pid in (leader, *descendants(leader)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def run_trial(number: int, seed: int, processes: int, work: Path) -> dict:
    path = list(PATHS)[number % len(PATHS)]
    words = ("--finetune", *PATHS[path], *LENGTH, "--dataset", str(work / "reviews"), "--no-comet", "--device", "cpu")
    whole = never_stopped(path, words, processes, work)
    folder = work / f"{path}-{processes}-trial"
    shutil.rmtree(folder, ignore_errors=True)
    cache = folder / "cache"
    packaged_default(work, cache)
    words = (*words, "--output_dir", str(folder / "runs"))
    moment = random.Random(f"{seed}/{number}").uniform(0, whole["seconds"])
    code, _ = run(words, processes, cache, kill_after=moment)
    made = sorted((folder / "runs").glob("*/config.json"))
    trial = {"trial": number, "seed": seed, "path": path, "processes": processes, "killed_after_s": round(moment, 2)}
    trial |= {"of_s": round(whole["seconds"], 2), "killed": code == -signal.SIGKILL, "at_step": last_step(made)}
    if not made or not (made[0].parent / "result.json").exists():
        again = ("--resume", str(made[0].parent)) if made else words  # killed before there was a run: the same command
        trial["resume_code"], _ = run(again, processes, cache)
        made = sorted((folder / "runs").glob("*/config.json"))
    trial["same"] = outcome(made[0].parent) == outcome(Path(whole["run"]))
    return trial


def never_stopped(path: str, words: tuple[str, ...], processes: int, work: Path) -> dict:
    """The run to compare with, made once, with the caches as empty as in a trial."""
    record = work / f"{path}-{processes}-whole.json"
    if not record.exists():
        folder = work / f"{path}-{processes}-whole"
        shutil.rmtree(folder, ignore_errors=True)
        packaged_default(work, folder / "cache")
        code, seconds = run((*words, "--output_dir", str(folder / "runs")), processes, folder / "cache")
        (made,) = (folder / "runs").iterdir()
        if code:
            raise SystemExit(f"the run of {path} that nothing stopped ended with {code}: see {folder}/log.txt")
        record.write_text(json.dumps({"seconds": seconds, "run": str(made)}))
    return json.loads(record.read_text())


def packaged_default(work: Path, cache: Path) -> None:
    """A cache that holds the packaged encoder and nothing else, so that killing can hit the filling of the others."""
    import packaged

    cache.mkdir(parents=True)
    encoder = packaged.encoder_folder()
    (cache / encoder.name).symlink_to(encoder)


def last_step(made: list[Path]) -> int | None:
    """The newest checkpoint's step as the kill left it; None without one, -1 where the run was done."""
    if not made:
        return None
    if (made[0].parent / "result.json").exists():
        return -1
    steps = [int(path.name[5:]) for path in made[0].parent.glob("checkpoints/step-*")]
    return max(steps, default=None)


def outcome(folder: Path) -> tuple:
    """Weights byte for byte, metrics but for times and rates, scores, predictions."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("time"), line.pop("train/samples_per_second", None)
    weights = {path.name: path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors"))}
    result = json.loads((folder / "result.json").read_text())
    return weights, lines, result["val"], result["test"], (folder / "predictions.jsonl").read_text()


if __name__ == "__main__":
    main()
