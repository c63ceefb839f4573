"""Specs of the worker processes. No Megatron and no vLLM here: the controller makes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from mcore_rl.cluster.placement import Placement
from mcore_rl.megatron.config import LoraConfig, MegatronConfig, OptimConfig
from mcore_rl.model_files import find_model
from mcore_rl.rollout.base import EngineSpec
from mcore_rl.types import Offloads

Spec = TypeVar("Spec", "ModelSpec", "ActorSpec", EngineSpec)


def with_found_model(spec: Spec) -> Spec:
    """Return the spec with the folder of its model on this machine.

    Raises:
        UserError: if the model does not exist.
    """
    return replace(spec, model_path=str(find_model(spec.model_path, download=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What every rank of a trained model is built from."""

    model_path: str
    """Folder, or name on the hub with the commit."""
    megatron: MegatronConfig
    optim: OptimConfig
    grad_clip: float
    total_steps: int
    """Steps of the run, for decaying schedules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpec(ModelSpec):
    """What every rank of the actor is built from."""

    temperature: float
    """Logits are divided by it, as in the engine."""
    with_reference: bool
    """Whether a frozen copy of the initial weights is kept, to be asked for log-probabilities."""
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
    offloads: Offloads = field(default_factory=Offloads)

    def on_this_machine(self) -> WorkerSpec:
        """Return the spec with the folders of the models on this machine. For models of the hub,
        one process per machine downloads what the cache lacks, if HF_HUB_OFFLINE=0 allows it.

        Raises:
            UserError: if a model is not there.
        """

        def found(spec: Any) -> Any:
            return None if spec is None else with_found_model(spec)

        return replace(
            self, actor=found(self.actor), engine=found(self.engine), critic=found(self.critic)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineWorkerSpec:
    """What the process of an engine is built from."""

    engine: EngineSpec
    number: int
    """Of the engine."""
