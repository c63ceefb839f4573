"""The phases of a run, and what the device holds in each.

The trainer and the engines enter a phase before they do its work. First, parts that the phase does
not need and that may be offloaded go to host memory; then the parts that it needs come back. So a
device never holds more than the phase needs and the parts that are never offloaded. Nothing moves
if the phase is already entered, or needs the same as the last one. Loops do not see any of this.

    generate -> logprobs -> ref_logprobs -> values -> train_critic -> train -> sync -> generate

`NEEDS` is the only table of these needs; the planner uses it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum

from mcore_rl.cluster.group import WorkerGroup, call, call_all, results
from mcore_rl.rollout.base import EnginePart
from mcore_rl.types import Offloads, Part
from mcore_rl.workers.roles import Actor, Critic, Rollout


class Phase(StrEnum):
    """A phase of a run."""

    GENERATE = "generate"
    LOGPROBS = "logprobs"
    REF_LOGPROBS = "ref_logprobs"
    VALUES = "values"
    TRAIN = "train"
    TRAIN_CRITIC = "train_critic"
    SYNC = "sync"
    """Weights go from the actor to the engines."""
    REVIVE = "revive"
    """Weights go from the actor to one engine while others generate."""
    SAVE = "save"
    """A checkpoint of the actor is written or read; its files may be written later, from copies."""
    SAVE_CRITIC = "save_critic"
    EXPORT = "export"
    """Weights go from the actor to a Hugging Face folder."""


class EngineNeeds(Enum):
    """What engines must have for a phase; the rest may sleep."""

    NOTHING = 0
    WEIGHTS = 1
    ALL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a phase needs on the device."""

    actor: frozenset[Part] = frozenset()
    critic: frozenset[Part] = frozenset()
    engine: EngineNeeds = EngineNeeds.NOTHING


_WEIGHTS = frozenset({Part.PARAM})
_STATE = frozenset({Part.PARAM, Part.OPTIMIZER})
_ALL = _STATE | {Part.GRAD}

NEEDS: Mapping[Phase, Needs] = {
    Phase.GENERATE: Needs(engine=EngineNeeds.ALL),
    Phase.LOGPROBS: Needs(actor=_WEIGHTS),
    Phase.REF_LOGPROBS: Needs(actor=frozenset({Part.REFERENCE})),
    Phase.VALUES: Needs(critic=_WEIGHTS),
    Phase.TRAIN: Needs(actor=_ALL),
    Phase.TRAIN_CRITIC: Needs(critic=_ALL),
    Phase.SYNC: Needs(actor=_WEIGHTS, engine=EngineNeeds.WEIGHTS),
    Phase.REVIVE: Needs(actor=_WEIGHTS, engine=EngineNeeds.ALL),
    Phase.SAVE: Needs(actor=_STATE),
    Phase.SAVE_CRITIC: Needs(critic=_STATE),
    Phase.EXPORT: Needs(actor=_WEIGHTS),
}


_WAKES = {EngineNeeds.WEIGHTS: EnginePart.WEIGHTS, EngineNeeds.ALL: EnginePart.KV_CACHE}


def away(phase: Phase, offloads: Offloads) -> tuple[frozenset[Part], frozenset[Part]]:
    """Return which parts of the actor and of the critic are in host memory in a phase."""
    needs = NEEDS[phase]
    actor = {offloads.reference if part is Part.REFERENCE else part for part in needs.actor}
    return offloads.actor - actor, offloads.critic - needs.critic


class Phases:
    """The phase that a run is in.

    Args:
        workers: running workers. All parts that may be offloaded are in host memory, and the
            engines are awake.
        offloads: these parts.
        engine_ranks: of all engines.
        sleep_level: at which the engines sleep; 0: never. At 2 they drop their weights.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        offloads: Offloads,
        engine_ranks: Sequence[int] = (),
        sleep_level: int = 0,
    ) -> None:
        self._workers, self._offloads = workers, offloads
        self._engine_ranks, self._sleep_level = list(engine_ranks), sleep_level
        self._away = offloads.actor, offloads.critic
        self._engines_have = EngineNeeds.ALL
        self.engines_forgot = False
        """Whether the engines have dropped their weights in sleep and need them to generate."""
        self.has_trained = False
        """Whether the actor's weights may differ from those of the last sync."""

    def enter(self, phase: Phase) -> None:
        """Bring what the phase needs to the device, and offload all else that may be offloaded."""
        before, after = self._away, away(phase, self._offloads)
        self._away = after
        self.has_trained |= phase is Phase.TRAIN
        roles = (Actor, Critic)
        needed = NEEDS[phase].engine if self._sleep_level else EngineNeeds.ALL
        if needed.value < self._engines_have.value:
            self._sleep(self._engine_ranks)
            self._engines_have = EngineNeeds.NOTHING
            self.engines_forgot = self._sleep_level > 1
        for role, was, will in zip(roles, before, after, strict=True):
            if leaves := will - was:
                call_all(self._workers, role.offload, sorted(leaves))
        for role, was, will in zip(roles, before, after, strict=True):
            if comes := was - will:
                call_all(self._workers, role.restore, sorted(comes))
        self._wake(self._engine_ranks, self._engines_have, needed)
        self._engines_have = max(self._engines_have, needed, key=lambda has: has.value)

    @property
    def engines_sleep(self) -> bool:
        """Whether some part of the engines is asleep: their requests wait."""
        return self._engines_have is not EngineNeeds.ALL

    def synced(self) -> None:
        """Take note that all engines have the actor's weights."""
        self.engines_forgot = self.has_trained = False

    def leave(self, rank: int) -> None:
        """Take note that an engine is being started again; it gets no sleep or wake calls."""
        if rank in self._engine_ranks:
            self._engine_ranks.remove(rank)

    def join(self, rank: int) -> None:
        """Bring an engine that was started again, and is fully awake, to the state of the
        others."""
        self._engine_ranks.append(rank)
        if self._engines_have is not EngineNeeds.ALL:
            self._sleep([rank])
            self._wake([rank], EngineNeeds.NOTHING, self._engines_have)

    def _sleep(self, ranks: Sequence[int]) -> None:
        asleep = call(Rollout.sleep, self._sleep_level)
        results(self._workers.submit(dict.fromkeys(ranks, asleep)))

    def _wake(self, ranks: Sequence[int], have: EngineNeeds, needed: EngineNeeds) -> None:
        for has, part in _WAKES.items():
            if have.value < has.value <= needed.value:
                awake = call(Rollout.wake, part)
                results(self._workers.submit(dict.fromkeys(ranks, awake)))
