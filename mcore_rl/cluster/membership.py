"""Which engines of a fleet take requests. This file starts and ends no process.

    member --lose--> starting again --join--> member

An engine that fails is lost: its requests go to the members, and it is started again. The number of
restarts in a run is limited. The engine joins at the next weight sync, with the weights that all
get then. Its starts are counted, so that a failure which is reported twice counts once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Start:
    """An engine from one start to the next."""

    engine: int
    number: int
    """0: the first start."""


class Membership:
    """The engines of a run.

    Args:
        num_engines: of the run, all of them members.
        max_restarts: in all.
    """

    def __init__(self, num_engines: int, max_restarts: int) -> None:
        self.num_restarts, self._max_restarts = 0, max_restarts
        self._starts = [Start(engine, 0) for engine in range(num_engines)]
        self._starting: set[int] = set()

    @property
    def num_restarts_left(self) -> int:
        return self._max_restarts - self.num_restarts

    @property
    def members(self) -> list[int]:
        """Engines that take requests, in order."""
        return [start.engine for start in self._starts if start.engine not in self._starting]

    @property
    def starting(self) -> list[int]:
        """Engines that are started again, in order."""
        return sorted(self._starting)

    def start_of(self, engine: int) -> Start:
        """Return the present start of an engine."""
        return self._starts[engine]

    def is_member(self, start: Start) -> bool:
        """Return whether an engine still takes requests since this start."""
        return self._starts[start.engine] == start and start.engine not in self._starting

    def lose(self, engine: int) -> bool:
        """Take note that an engine failed, as a member or while it started; return whether it may
        be started again, which is counted."""
        if not self.num_restarts_left:
            return False
        self.num_restarts += 1
        self._starting.add(engine)
        self._starts[engine] = Start(engine, self._starts[engine].number + 1)
        return True

    def join(self, engine: int) -> None:
        """Take note that an engine which was started again has the weights that all have."""
        assert engine in self._starting, f"engine {engine} was not lost"
        self._starting.remove(engine)
