"""Seconds per stage of a step, as metrics `time/<stage>`.

A stage that runs several times in a step adds up. Stages may nest ("step" around "rollout"): each
reports its own wall time, so an outer one contains its inner ones. Host time only: a stage that
launches work on a device without waiting for it reports the launch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mcore_rl.metrics import Metrics, total


class StepTimers:
    """Collects the stage times of one step at a time."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the wall time of the block to `time/<stage>`, also when the block raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[stage] = self._seconds.get(stage, 0.0) + elapsed

    def metrics(self) -> Metrics:
        """Return `time/<stage>` and `time/step` in seconds since the last call; start again.

        `time/step` is all wall time since then, so the sum over steps is that of the run.
        """
        now = time.perf_counter()
        seconds = {**self._seconds, "step": now - self._start}
        self._seconds, self._start = {}, now
        return {f"time/{stage}": total(value) for stage, value in seconds.items()}


def format_duration(seconds: float) -> str:
    """Return whole seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
