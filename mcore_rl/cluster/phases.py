"""What a run does at a moment, and what the device holds meanwhile.

The trainer and the engines enter a phase before they do what it is named after. What the phase does
not need and may be offloaded leaves for host memory first; then what it needs comes back. So a
device never holds more than a phase needs and what stays with it anyway. A phase that is entered
already, or needs what the last one did, moves nothing. Loops know nothing of it.

    generate -> logprobs -> ref_logprobs -> values -> train_critic -> train -> sync -> generate

`NEEDS` is the one table of it; the planner counts with it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum

from mcore_rl.cluster.group import WorkerGroup, call_all
from mcore_rl.types import Offloads, Part
from mcore_rl.workers.roles import Actor, Critic


class Phase(StrEnum):
    """What a run does at a moment."""

    GENERATE = "generate"
    LOGPROBS = "logprobs"
    REF_LOGPROBS = "ref_logprobs"
    VALUES = "values"
    TRAIN = "train"
    TRAIN_CRITIC = "train_critic"
    SYNC = "sync"
    """Weights go from the actor to the engines."""
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
    Phase.SAVE: Needs(actor=_STATE),
    Phase.SAVE_CRITIC: Needs(critic=_STATE),
    Phase.EXPORT: Needs(actor=_WEIGHTS),
}


def away(phase: Phase, offloads: Offloads) -> tuple[frozenset[Part], frozenset[Part]]:
    """Return which parts of the actor and of the critic are in host memory in a phase."""
    needs = NEEDS[phase]
    actor = {offloads.reference if part is Part.REFERENCE else part for part in needs.actor}
    return offloads.actor - actor, offloads.critic - needs.critic


class Phases:
    """The phase that a run is in.

    Args:
        workers: running workers, with everything that may be offloaded in host memory.
        offloads: what that is.
    """

    def __init__(self, workers: WorkerGroup, offloads: Offloads) -> None:
        self._workers, self._offloads = workers, offloads
        self._away = offloads.actor, offloads.critic

    def enter(self, phase: Phase) -> None:
        """Have on the device what the phase needs, and nothing else of what may be offloaded."""
        before, after = self._away, away(phase, self._offloads)
        self._away = after
        # Engines have their place here: those that sleep do so with what leaves, before anything
        # comes or wakes.
        roles = (Actor, Critic)
        for role, was, will in zip(roles, before, after, strict=True):
            if leaves := will - was:
                call_all(self._workers, role.offload, sorted(leaves))
        for role, was, will in zip(roles, before, after, strict=True):
            if comes := was - will:
                call_all(self._workers, role.restore, sorted(comes))
