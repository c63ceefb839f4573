"""How much of a long call a worker has done, for whoever watches that it goes on.

What takes long (micro-batches, engine steps, files) calls `tick` for each piece; a heartbeat beside
the work reads `ticks`. Nothing else may depend on the number.
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
