"""How much of a long call a worker has done, for the watch on progress.

Long work (micro-batches, engine steps, files) calls `tick` for each piece; the heartbeat, which
runs during the work, reads `ticks`. Nothing else may depend on the number.
"""

from __future__ import annotations

_ticks = 0


def tick() -> None:
    """Say that a piece of work is done."""
    global _ticks
    _ticks += 1


def ticks() -> int:
    """Return how many pieces of work this process has done."""
    return _ticks
