"""What worker processes are built from. No Megatron, no vLLM here: the controller makes it."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.cluster.placement import Placement
from mcore_rl.megatron.config import LoraConfig, MegatronConfig, OptimConfig
from mcore_rl.rollout.base import EngineSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What every rank of a trained model is built from."""

    model_path: str
    megatron: MegatronConfig
    optim: OptimConfig
    grad_clip: float
    total_steps: int
    """Steps of the run, for decaying schedules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpec(ModelSpec):
    """What every rank of the actor is built from."""

    temperature: float
    """Logits are divided by it, as the engine does."""
    with_reference: bool
    """Whether log-probabilities under the initial weights will be asked for. A frozen copy of them
    is kept for it, unless adapters leave the weights as they are."""
    lora: LoraConfig | None = None
    """None: all weights train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What every worker process is built from; the same on all of them."""

    placement: Placement
    actor: ActorSpec
    engine: EngineSpec | None
    """None where nothing is generated (supervised fine-tuning)."""
    critic: ModelSpec | None = None
    """None where the advantages need no values."""
