"""Trackers that fail: `python bench/tracker_faults.py [--jobs 4] [--faults refuses hangs 500]`.

18 runs of a tiny model, one for each of 3 faults (the server refuses connections, hangs, answers 500), 2 trackers (the
real clients of W&B and Comet) and 3 moments (from the start, in the middle, at the end), against a server on loopback.
Each must end as the run without a tracker did, bit for bit. Printed for each: seconds that training waited for tracking
while it ran and at its end, and the lines the user was shown about the tracker.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]
FAULTS, TRACKERS, MOMENTS = ("refuses", "hangs", "500"), ("wandb", "comet"), ("start", "middle", "end")
WORDS = ("--finetune", "--epochs", "4", "--batch_size", "4", "--lr", "1e-2", "--device", "cpu")  # 96 steps
TITLES = {"wandb": "W&B", "comet": "Comet"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time; most of their time is waiting")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS)
    parser.add_argument("--child", nargs=4, metavar=("FAULT", "TRACKER", "MOMENT", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return print(json.dumps(run(*given.child[:3], Path(given.child[3]))))
    import standin_hub
    from kill import outcome

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        standin_hub.write_tiny_model(folder / "tiny")
        standin_hub.write_tiny_dataset(folder / "rotten_tomatoes", "rotten_tomatoes", 96)
        child("none", "none", "start", folder)
        cases = [(fault, tracker, moment) for fault in given.faults for tracker in TRACKERS for moment in MOMENTS]
        with ThreadPoolExecutor(given.jobs) as pool:
            expected = outcome(next((folder / "none-none-start" / "runs").iterdir()))
            good = 0
            for case, row in zip(cases, pool.map(lambda case: child(*case, folder), cases), strict=True):
                row["same"] = outcome(next((folder / "-".join(case) / "runs").iterdir())) == expected
                row["ok"] = row["same"] and row["while_s"] <= 10 and row["end_s"] <= 30 and len(row["told"]) == 1
                good += row["ok"]
                print(json.dumps({"fault": "/".join(case), **row}), flush=True)
    print(f"{good} of {len(cases)}: same result, at most 10 s lost while training and 30 s at its end, one line each")


def child(fault: str, tracker: str, moment: str, folder: Path) -> dict[str, Any]:
    """One run in a process of its own, with a home of its own."""
    home = folder / f"{fault}-{tracker}-{moment}"
    (home / "tmp").mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "COMET_"))}
    own = {"HOME": home, "TMPDIR": home / "tmp", "DISTILBERT_SENTIMENT_CACHE": home / "cache"}
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", fault, tracker, moment, str(folder)],
        env=kept | {name: str(value) for name, value in own.items()},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{fault} {tracker} {moment}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Keys:
    """What test_tracking.point_at wants: something with `setenv`."""

    setenv = staticmethod(os.environ.__setitem__)


def run(fault: str, tracker: str, moment: str, folder: Path) -> dict[str, Any]:
    """Train with the fault at its moment; the seconds spent in the logger's calls, and what was told."""
    from test_tracking import Server, point_at, wait_until

    import tracking

    server, lost, calls = Server(), {"while_s": 0.0, "end_s": 0.0}, [0]
    point_at(Keys, server)

    def break_down() -> None:
        if moment != "start":  # its first values have arrived
            path = {"wandb": "/file_stream", "comet": "/experiment/metric"}[tracker]
            wait_until(lambda: any(asked.endswith(path) for asked, _ in list(server.requests)), 60)
        server.mode = "500" if fault == "500" else "hang"
        if fault == "refuses":
            server.shutdown()
            server.server_close()

    def timed(function: Any, key: str, breaks_at: int | None = None) -> Any:
        def call(*facts: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == breaks_at:
                break_down()
            started = time.perf_counter()
            try:
                return function(*facts, **named)
            finally:
                lost[key] += time.perf_counter() - started

        return call

    if moment == "start" and tracker != "none":
        break_down()
    tracking.open_logger = timed(tracking.open_logger, "while_s")
    tracking.RunLogger.log = timed(tracking.RunLogger.log, "while_s", 7 if moment == "middle" else None)
    close = tracking.RunLogger.close

    def closing(self: Any, status: str = "finished") -> None:
        if moment == "end":
            break_down()
        timed(close, "end_s")(self, status)

    tracking.RunLogger.close = closing
    from main import main as tool

    said = io.StringIO()
    on = {"wandb": ("--wandb", "--no-comet"), "comet": ("--comet",), "none": ("--no-comet",)}[tracker]
    where = ("--model", str(folder / "tiny"), "--dataset", str(folder / "rotten_tomatoes"))
    where += ("--output_dir", str(folder / f"{fault}-{tracker}-{moment}" / "runs"))
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = tool([*WORDS, *on, *where])
    if code:
        raise SystemExit(said.getvalue())
    title = TITLES.get(tracker, "none")
    told = [line for line in said.getvalue().splitlines() if title in line and "recording to" not in line]
    return {**{key: round(value, 2) for key, value in lost.items()}, "told": told}


if __name__ == "__main__":
    main()
