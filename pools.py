"""Where the processes of a sweep run: on this machine, or on those of a Ray cluster. Both give futures."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from config import UserError

POLL_SECONDS = 0.2


class Pool(Protocol):
    """Where the processes of a sweep run."""

    workers: int  # how many share a processor or a GPU
    at_once: int  # how many run together

    def submit(self, command: list[str], log: Path) -> Future:
        """Run `command` when there is room, its output to `log`. The future's result is its exit code."""

    def stop(self, number: int) -> None:
        """Start nothing more, and pass the signal on to what runs."""


def run_command(
    command: list[str],
    log: Path,
    env: dict[str, str],
    cwd: str,
    started: Callable[[subprocess.Popen], None] = lambda child: None,
    keep_open: tuple[int, ...] = (),
) -> int:
    """`python COMMAND` to its end, its output appended to `log`. Returns its exit code.

    It gets a process group of its own: Ctrl-C in a terminal reaches a whole group, and a second one would end a run
    without its checkpoint; so the sweep alone gets it, and passes it on once. KeyboardInterrupt here is passed on too.
    """
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            cwd=cwd,
            start_new_session=True,
            pass_fds=keep_open,
        )
        started(child)
        while child.poll() is None:
            try:
                time.sleep(POLL_SECONDS)  # not wait(): Ray's cancel cannot interrupt that
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
        return child.returncode


class LocalPool:
    """`workers` processes at once on this machine, each with its share of the cores.

    The children inherit the sweep's lock: it is held until the last of them ends, even if the sweep is killed.
    """

    def __init__(self, workers: int, lock: int) -> None:
        self.workers = self.at_once = workers
        self.lock_file, self.stopped = lock, 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = {"OMP_NUM_THREADS": str(max(1, cores // workers)), "RUNS_AT_ONCE": str(workers)}
        self.env = share if workers > 1 else {}
        self.threads, self.guard = ThreadPoolExecutor(workers), threading.RLock()
        self.children: list[subprocess.Popen] = []

    def submit(self, command: list[str], log: Path) -> Future:
        """See Pool."""
        return self.threads.submit(self._run, command, log)

    def _run(self, command: list[str], log: Path) -> int:
        if self.stopped:
            return 128 + self.stopped
        return run_command(command, log, self.env, str(Path.cwd()), self._started, (self.lock_file,))

    def _started(self, child: subprocess.Popen) -> None:
        with self.guard:
            self.children.append(child)
            if self.stopped:
                child.send_signal(self.stopped)

    def stop(self, number: int) -> None:
        """See Pool."""
        with self.guard:
            self.stopped = number
            for child in self.children:
                child.send_signal(number)  # does nothing where it has ended

    def __enter__(self) -> "LocalPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.threads.shutdown()


class RayPool:
    """`workers` processes at once on each machine of a Ray cluster, whose scheduler decides which run goes where.

    The machines must see this folder and --output_dir under the same paths (a shared file system).
    """

    def __init__(self, address: str, workers: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError("--ray: Ray is not installed; pip install -r requirements-ray.txt") from error
        try:
            ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--ray {address}: no cluster there: {error}") from error
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        cpus = max(1, int(min(machine["CPU"] for machine in machines)) // workers)
        gpus = min(machine.get("GPU", 0) for machine in machines) / workers
        self.at_once, self.ray, self.refs = workers * len(machines), ray, []
        # No retries: a failed run is listed, and tried again by the next call.
        self.remote = ray.remote(num_cpus=cpus, num_gpus=min(1.0, gpus), max_retries=0)(run_command)
        self.workers = max(1, int(1 / gpus + 1e-6)) if gpus else workers
        self.env = {"OMP_NUM_THREADS": str(cpus), "RUNS_AT_ONCE": str(self.workers)}

    def submit(self, command: list[str], log: Path) -> Future:
        """See Pool."""
        self.refs.append(self.remote.remote(command, log.resolve(), self.env, str(Path.cwd())))
        return self.refs[-1].future()

    def stop(self, number: int) -> None:
        """See Pool. A cancelled task gets KeyboardInterrupt, which `run_command` passes on as SIGINT."""
        for ref in self.refs:
            self.ray.cancel(ref)

    def __enter__(self) -> "RayPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.ray.shutdown()


class ForwardSignals:
    """While it is open, the first Ctrl-C or SIGTERM goes to the pool; `number` is the signal's, or 0. A second one
    would end the runs without their checkpoints."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.number = pool, 0

    def __enter__(self) -> "ForwardSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, _: Any) -> None:
        if self.number:
            return
        self.number = number
        self.pool.stop(number)
        with contextlib.suppress(OSError):  # Ctrl-C ends `tee`, too
            os.write(2, b"stopping the runs after their step\n")  # print may be busy just now

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
