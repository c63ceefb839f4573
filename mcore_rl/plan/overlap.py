"""The gain from generation during training: a run simulated event by event, in seconds.

    admit(s) -> requests wait for a slot of their engine -> all of step s are answered
             -> reward -> train -> sync, engines paused -> weights s + 1 published -> admit

Pacing is that of `loop/buffer.py`: generation for step s is admitted when weights
s - `max_staleness` are published, and an engine runs requests in the order in which it was given
them. A request takes as long as it would on a full engine. Not simulated: validations, checkpoints,
further draws of a step whose groups are filtered, engines that fail.

Example: a step of 8 s of generation and 6 s of training takes 14 s with `max_staleness=0` and 8 s
with 1, of which the trainer waits 2 s.
"""

from __future__ import annotations

import heapq
import math
import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

Requests: TypeAlias = Sequence[Sequence[float]]
"""Seconds of each request of a step in its slot, group by group. A group goes to one engine; the
groups go to the engines in turn."""


class Doing(StrEnum):
    """The present work of the trainer's side."""

    WAIT = "wait"
    """Waiting for the responses of the step."""
    REWARD = "reward"
    TRAIN = "train"
    SYNC = "sync"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """All engines."""

    num_engines: int
    slots: int
    """Requests that an engine runs at a time; the others wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """A step without its generation, in seconds."""

    train: float
    """Passes and updates: all between the rewards and the sync."""
    reward: float = 0.0
    sync: float = 0.0
    recompute: float = 0.0
    """Seconds after a sync, for each second that a running request had been in its slot: the engine
    computes its keys and values again."""


@dataclass(slots=True)
class SimulatedStep:
    """Where the time of a step went, from the publication of its weights to that of the next."""

    seconds: dict[Doing, float] = field(default_factory=lambda: dict.fromkeys(Doing, 0.0))
    busy: dict[Doing, float] = field(default_factory=lambda: dict.fromkeys(Doing, 0.0))
    """Seconds of each kind of work in which engines had requests, as the mean over engines."""
    oldest: int = 0
    """How many steps older the weights of its first token are than the weights that train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Means over steps."""

    step_s: float
    shares: Mapping[Doing, float]
    """Of the time."""
    engines_busy: float
    """Share of the time in which engines had requests, paused ones too: as
    `perf/engines_busy_frac`."""
    overlap: float
    """Share of the time in which engines had requests while rewards or updates were computed."""
    oldest: int
    """Largest age, in steps."""

    @classmethod
    def of(cls, steps: Sequence[SimulatedStep]) -> Overlap:
        """Return the mean of at least one step."""
        spent = {doing: sum(step.seconds[doing] for step in steps) for doing in Doing}
        busy = {doing: sum(step.busy[doing] for step in steps) for doing in Doing}
        whole = sum(spent.values())
        return cls(
            step_s=whole / len(steps),
            shares={doing: spent[doing] / whole for doing in Doing},
            engines_busy=sum(busy.values()) / whole,
            overlap=(busy[Doing.REWARD] + busy[Doing.TRAIN]) / whole,
            oldest=max(step.oldest for step in steps),
        )


def simulate(
    draws: Sequence[Requests], fleet: Fleet, step: StepSeconds, max_staleness: int
) -> list[SimulatedStep]:
    """Return the steps of a run that trains on each draw in turn; all its time is in them.

    Args:
        draws: by step: at least one request.
        fleet: the engines.
        step: what else a step takes.
        max_staleness: `trainer.max_staleness`.
    """
    engines = [_Engine(fleet.slots) for _ in range(fleet.num_engines)]
    admitted: list[list[list[_Span]]] = []
    now, done = 0.0, []
    for number in range(len(draws)):
        this = SimulatedStep()
        while len(admitted) <= min(number + max_staleness, len(draws) - 1):
            groups = draws[len(admitted)]
            admitted.append(
                [
                    engine.begin(now, [s for group in groups[first :: len(engines)] for s in group])
                    for first, engine in enumerate(engines)
                ]
            )
        work = list(zip(engines, admitted[number], strict=True))
        answered = max(engine.end_of(spans) for engine, spans in work)
        drawn_by = [engine.version(spans) for engine, spans in work if spans]
        this.oldest = number - min(drawn_by)
        for doing, seconds in (
            (Doing.WAIT, max(0.0, answered - now)),
            (Doing.REWARD, step.reward),
            (Doing.TRAIN, step.train),
            (Doing.SYNC, step.sync),
        ):
            if doing is Doing.SYNC:
                for engine in engines:
                    engine.take_weights(now, step.sync, step.recompute)
            busy = statistics.fmean(engine.busy(now, now + seconds) for engine in engines)
            this.seconds[doing], this.busy[doing] = seconds, busy
            now += seconds
        done.append(this)
    return done


_Span: TypeAlias = tuple[float, float]
"""Start and end of a request, on the clock of its engine."""


class _Engine:
    """Slots with a clock of their own, which stops while the engine is paused or recomputes."""

    def __init__(self, slots: int) -> None:
        self._free = [0.0] * slots
        """When each slot is done with what it was given."""
        self._stood = self._now = 0.0
        self._unfinished: list[_Span] = []
        self._published: list[float] = []
        """When each version of the weights came, from 1."""

    def _read(self, now: float) -> float:
        """Return the time of its clock at a time of the run."""
        self._now = max(self._now, now - self._stood)
        return self._now

    def begin(self, now: float, seconds: Sequence[float]) -> list[_Span]:
        """Take requests; return when each runs."""
        given, spans = self._read(now), []
        for of_request in seconds:
            start = max(given, self._free[0])
            heapq.heapreplace(self._free, start + of_request)
            spans.append((start, start + of_request))
        self._unfinished += spans
        return spans

    def end_of(self, spans: Sequence[_Span]) -> float:
        """Return when the last of them ends, if no pause comes before."""
        return max((end for _, end in spans), default=-math.inf) + self._stood

    def version(self, spans: Sequence[_Span]) -> int:
        """Return the weights that drew the first token of requests given together."""
        return bisect_right(self._published, spans[0][0])

    def take_weights(self, now: float, seconds: float, recompute: float) -> None:
        """Take weights for so many seconds from now, then continue the running requests."""
        at = self._read(now)
        self._unfinished = [span for span in self._unfinished if span[1] > at]
        if self._unfinished:
            running = sum(max(0.0, at - start) for start, _ in self._unfinished)
            self._stood += seconds + recompute * running
        self._published.append(self._read(now + seconds))

    def busy(self, start: float, end: float) -> float:
        """Return for how many of these seconds it has requests, if it is given no others."""
        return max(0.0, min(end, max(self._free) + self._stood) - start)


def alone(draws: Sequence[Requests], fleet: Fleet) -> float:
    """Return the mean seconds in which the engines answer a step, without other work meanwhile."""
    return Overlap.of(simulate(draws, fleet, StepSeconds(train=0.0), max_staleness=0)).step_s
