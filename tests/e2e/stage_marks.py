"""Plug-in of the command: a tracker that writes down when each stage of a step begins.

In the stage of a test's choice it kills the run, or sends one worker a signal: from within, because
stages of milliseconds are over before another process has seen them begin.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from mcore_rl.observability.trackers import TRACKERS, RunInfo, Tracker

_PATHS = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
MARKED = {"MCORE_RL_PLUGINS": "stage_marks", "PYTHONPATH": os.pathsep.join(_PATHS)}
"""Environment of a command that is to find this plug-in."""

FILE = "stages.txt"
KILL_AT = "STAGE_MARKS_KILL_AT"
"""Environment variable "<stage> <n> <seconds>": kill so long after the n-th such stage of this
start began, counted from 1, or at its end if that comes first."""
WORKER = "STAGE_MARKS_WORKER"
"""Environment variable "<rank> <signal>": send that worker the signal instead, or for a rank
"controller" this process and for "engine" an engine that is a process of its own, and write down
when as the stage "signal"."""


@TRACKERS.register("stage_marks")
class StageMarks(Tracker):
    """Lines "<stage> <seconds>" in `stages.txt` of the run folder."""

    def __init__(self, run: RunInfo) -> None:
        self._file = run.dir / FILE
        self._stage, number, delay = os.environ.get(KILL_AT, "- 0 0").split()
        self._num_to_come, self._delay = int(number), float(delay)
        self._is_over = threading.Event()
        self._killer: threading.Thread | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def stage(self, name: str) -> None:
        if self._killer:
            self._is_over.set()
            self._killer.join()
        with self._file.open("a") as file:
            file.write(f"{name} {time.monotonic()}\n")
        if name == self._stage:
            self._num_to_come -= 1
            if self._num_to_come == 0:
                self._killer = threading.Thread(target=self._strike)
                self._killer.start()

    def _strike(self) -> None:
        worker = os.environ.get(WORKER)
        processes = [_worker(worker.split()[0])] if worker else _whole_run()
        number = signal.Signals[worker.split()[1]] if worker else signal.SIGKILL
        self._is_over.wait(self._delay)
        if worker:
            with self._file.open("a") as file:
                file.write(f"signal {time.monotonic()}\n")
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)


def _whole_run() -> list[int]:
    """Return the ids of the command's workers and other children, and its own as the last."""
    children = psutil.Process().children(recursive=True)
    return [*(child.pid for child in children), os.getpid()]


def _worker(rank: str) -> int:
    """Return the id of the worker process of a rank, of an engine, or of this process."""
    if rank == "controller":
        return os.getpid()
    children = psutil.Process().children()
    if rank == "engine":
        return next(x.pid for x in children if "mcore_rl.launch.engine_process" in x.cmdline())
    (found,) = [child.pid for child in children if child.environ().get("RANK") == rank]
    return found


def read_stages(run_dir: Path) -> list[tuple[str, float]]:
    """Return (stage, when it began) of every stage so far."""
    lines = (run_dir / FILE).read_text().splitlines(True)
    marks = [line.split() for line in lines if line.endswith("\n")]
    return [(name, float(seconds)) for name, seconds in marks]
