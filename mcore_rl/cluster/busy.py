"""How much of the time engines have had something to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class BusyTimes:
    """Seconds in which each engine had requests; from any thread.

    Args:
        num_engines: of the run.
        clock: returns the time in seconds.
    """

    def __init__(self, num_engines: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._num_running = [0] * num_engines
        self._busy = [0.0] * num_engines
        self._since = self._looked = clock()

    def begin(self, engine: int) -> None:
        """Take note that the engine was given requests."""
        self._count(engine, 1)

    def end(self, engine: int) -> None:
        """Take note that the engine has answered requests that it was given together."""
        self._count(engine, -1)

    def share(self) -> float:
        """Return the mean over engines of the share of the time since the last call in which they
        had something to do; 0.0 without engines."""
        with self._lock:
            self._add()
            elapsed = self._looked - self._since
            total = sum(self._busy) / max(1, len(self._busy))
            self._since, self._busy = self._looked, [0.0] * len(self._busy)
        return total / elapsed if elapsed > 0 else 0.0

    def _count(self, engine: int, change: int) -> None:
        with self._lock:
            self._add()
            self._num_running[engine] += change

    def _add(self) -> None:
        """Count the time since the last look, during which nothing changed."""
        now = self._clock()
        for engine, num in enumerate(self._num_running):
            if num:
                self._busy[engine] += now - self._looked
        self._looked = now
