"""Plug-in of the command: a tracker that writes down when each stage of a step begins.

So that a test can kill a run in the stage of its choice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from mcore_rl.observability.trackers import TRACKERS, RunInfo, Tracker

FILE = "stages.txt"


@TRACKERS.register("stage_marks")
class StageMarks(Tracker):
    """Lines "<stage> <seconds>" in `stages.txt` of the run folder."""

    def __init__(self, run: RunInfo) -> None:
        self._file = run.dir / FILE

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def stage(self, name: str) -> None:
        with self._file.open("a") as file:
            file.write(f"{name} {time.monotonic()}\n")


def read_stages(run_dir: Path) -> list[tuple[str, float]]:
    """Return (stage, when it began) of every stage so far."""
    file = run_dir / FILE
    lines = file.read_text().splitlines(True) if file.exists() else []
    marks = [line.split() for line in lines if line.endswith("\n")]
    return [(name, float(seconds)) for name, seconds in marks]
