"""What a device holds in each phase of a run: work on either side, and the moments in between.

Which part of a model is where follows from `cluster/phases.py`, which moves them in the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mcore_rl.cluster.phases import NEEDS, EngineNeeds, Phase, away
from mcore_rl.config.run import RunConfig
from mcore_rl.plan.memory import StageMemory
from mcore_rl.types import Offloads, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Memory of an engine on one of its devices, in bytes."""

    weights: int
    kv_cache: int
    """Cache and memory for its passes: all memory of the engine except the weights."""
    sleep_level: int
    """`rollout.sleep_level`."""

    def held(self, needs: EngineNeeds) -> int:
        """Return what is on the device while so much of the engine is needed."""
        if self.sleep_level == 0:
            return self.weights + self.kv_cache
        weights = self.weights if needs.value >= EngineNeeds.WEIGHTS.value else 0
        return weights + (self.kv_cache if needs is EngineNeeds.ALL else 0)

    def in_host_memory(self, needs: EngineNeeds) -> int:
        """Return the bytes that are in host memory meanwhile."""
        return self.weights if self.sleep_level == 1 and needs is EngineNeeds.NOTHING else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What one device holds in a phase, in bytes."""

    phase: Phase
    actor: int
    reference: int
    critic: int
    own: int
    """Memory of the work itself: activations and logits, weights being exported."""
    engine: int
    host: int
    """In host memory for this device meanwhile."""

    @property
    def total(self) -> int:
        return self.actor + self.reference + self.critic + self.own + self.engine


def phases_of(cfg: RunConfig) -> list[Phase]:
    """Return the phases of a run, in the order of a step."""
    wanted = {
        Phase.REF_LOGPROBS: cfg.needs_reference,
        Phase.VALUES: cfg.has_critic,
        Phase.TRAIN_CRITIC: cfg.has_critic,
        Phase.SAVE_CRITIC: cfg.has_critic,
        Phase.EXPORT: cfg.trainer.export_hf_model,
        Phase.REVIVE: cfg.rollout.max_engine_restarts > 0,
    }
    return [phase for phase in Phase if wanted.get(phase, True)]


def fullest_moments(
    phases: Sequence[Phase],
    memory: Sequence[StageMemory],
    engine: EngineMemory,
    offloads: Offloads,
) -> list[Moment]:
    """Return the memory of each phase on the stage with the largest need."""
    return [
        max((_moment(phase, stage, engine, offloads) for stage in memory), key=lambda m: m.total)
        for phase in phases
    ]


def most_host_memory(
    phases: Sequence[Phase],
    memory: Sequence[StageMemory],
    engine: EngineMemory,
    offloads: Offloads,
) -> int:
    """Return the most that is in host memory for one device at any time."""
    return max(_moment(phase, stage, engine, offloads).host for phase in phases for stage in memory)


def _moment(phase: Phase, stage: StageMemory, engine: EngineMemory, offloads: Offloads) -> Moment:
    gone, gone_of_critic = away(phase, offloads)
    here = {part: size for part, size in stage.actor.items() if part not in gone}
    here_of_critic = {p: size for p, size in stage.critic.items() if p not in gone_of_critic}
    reference, critic = here.pop(Part.REFERENCE, 0), sum(here_of_critic.values())
    needs = NEEDS[phase].engine
    everything = sum(stage.actor.values()) + sum(stage.critic.values())
    actor = sum(here.values())
    return Moment(
        phase=phase,
        actor=actor,
        reference=reference,
        critic=critic,
        own=own(phase, stage),
        engine=engine.held(needs),
        host=everything - actor - reference - critic + engine.in_host_memory(needs),
    )


def own(phase: Phase, stage: StageMemory) -> int:
    """Return the bytes that the work of a phase needs, without models and engine."""
    match phase:
        case Phase.GENERATE:
            return 0  # of what the engine is given
        case Phase.LOGPROBS | Phase.REF_LOGPROBS:
            return stage.forward + stage.logits
        case Phase.VALUES:
            return stage.forward
        case Phase.TRAIN:
            return stage.activations + stage.logits
        case Phase.TRAIN_CRITIC:
            return stage.activations
        case Phase.SYNC | Phase.REVIVE | Phase.EXPORT:
            return stage.export
        case Phase.SAVE | Phase.SAVE_CRITIC:
            return 0  # copies are in host memory
