"""Plug-in of the command: a tracker that writes down when each stage of a step begins.

In the stage of a test's choice it kills the run: from within, because stages of milliseconds are
over before another process has seen them begin.
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
                arguments = (self._is_over, self._delay, _whole_run())
                self._killer = threading.Thread(target=_kill_after, args=arguments)
                self._killer.start()


def _whole_run() -> list[int]:
    """Return the ids of the command's workers and other children, and its own as the last."""
    children = psutil.Process().children(recursive=True)
    return [*(child.pid for child in children), os.getpid()]


def _kill_after(is_over: threading.Event, seconds: float, processes: list[int]) -> None:
    is_over.wait(seconds)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def read_stages(run_dir: Path) -> list[tuple[str, float]]:
    """Return (stage, when it began) of every stage so far."""
    lines = (run_dir / FILE).read_text().splitlines(True)
    marks = [line.split() for line in lines if line.endswith("\n")]
    return [(name, float(seconds)) for name, seconds in marks]
