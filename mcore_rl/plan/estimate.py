"""What the devices of a run hold, from its configuration: one object for all that plans show."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from mcore_rl.config.run import RunConfig
from mcore_rl.data.packing import TokenBudget
from mcore_rl.dtypes import BYTES
from mcore_rl.models.spec import load_hf_config, model_family
from mcore_rl.plan.memory import (
    StageMemory,
    activation_memory,
    export_memory,
    kv_bytes_per_token,
    logit_memory,
    save_memory,
    state_memory,
)
from mcore_rl.plan.moments import (
    EngineMemory,
    Moment,
    fullest_moments,
    most_host_memory,
    phases_of,
)
from mcore_rl.plan.parameters import ParameterCounts, StageParameters, num_elements
from mcore_rl.plan.step_time import Model
from mcore_rl.types import Layout, Offloads, Part

GIB = 2**30
USABLE = 0.9
"""Share of a device for the estimate; the rest is for memory that `memory.py` does not count."""


class ModelCounts:
    """Counts of the models of a run that do not depend on the layout; made once for many layouts.

    Args:
        cfg: the run.
        hf_config: of its actor.
    """

    def __init__(self, cfg: RunConfig, hf_config: PreTrainedConfig) -> None:
        self.hf_config = hf_config
        family = model_family(hf_config)
        self.arch = family.transformer_kwargs(hf_config)
        entries = family.entries(hf_config)
        self.num_parameters = num_elements(entries)
        self.timed = Model(
            arch=self.arch,
            total=self.num_parameters,
            experts=num_elements(entry for entry in entries if entry.is_expert),
            vocab=hf_config.vocab_size * hf_config.hidden_size,
        )
        """What step times are counted with."""
        bucket_bytes = cfg.rollout.update_weights_bucket_mib << 20
        self.export = export_memory(entries, cfg.actor.megatron.dtype, bucket_bytes)
        self.actor = ParameterCounts(
            hf_config,
            routers_are_frozen=cfg.actor.megatron.moe_router_freeze,
            lora=cfg.model.lora,
        )
        self.critic: ParameterCounts | None = None
        if cfg.has_critic:
            of_critic = load_hf_config(cfg.critic.model.folder or cfg.model.folder)
            self.critic = ParameterCounts(of_critic, has_output_layer=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The memory of a run."""

    stages: Sequence[StageParameters]
    memory: Sequence[StageMemory]
    """By stage."""
    engine: EngineMemory
    """On one of its devices, whichever these are."""
    moments: Sequence[Moment]
    """Memory of each phase on a train worker's device, on the stage with the largest need."""
    resident: Sequence[Moment]
    """The same if nothing were offloaded and engines never slept."""
    host_per_device: int
    """Most bytes in host memory for one device, of what is offloaded."""
    saved_per_device: int
    """Bytes in host memory for one device until a checkpoint is written."""
    num_kv_tokens: int
    """Tokens that the cache of one engine holds."""
    longest: int
    """Tokens of the longest sample."""
    device: float
    """Bytes of a device."""

    @property
    def fullest(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= USABLE * self.device and self.num_kv_tokens >= self.longest


def estimate(
    cfg: RunConfig,
    counts: ModelCounts,
    layout: Layout,
    *,
    largest_micro_batch: int,
    num_micro_batches: int,
) -> Estimate:
    """Return the estimate of a run.

    Args:
        cfg: the run.
        counts: of its models.
        layout: of the trainer.
        largest_micro_batch: tokens, where micro-batches are not cut by tokens; a budget is planned
            for in full: some step will fill it.
        num_micro_batches: of the largest minibatch, on one rank.
    """
    trainer = trainer_memory(
        cfg,
        counts,
        layout,
        largest_micro_batch=largest_micro_batch,
        num_micro_batches=num_micro_batches,
    )
    return assemble(cfg, counts, trainer)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerMemory:
    """Memory of the trainer on the devices of each stage."""

    stages: Sequence[StageParameters]
    memory: Sequence[StageMemory]


def assemble(cfg: RunConfig, counts: ModelCounts, trainer: TrainerMemory) -> Estimate:
    """Return the estimate of a run from the trainer's part.

    Args:
        cfg: the run; of the trainer only what leaves the device is read.
        counts: of its models.
        trainer: its part.
    """
    engine = engine_memory(cfg, counts)
    here = engine
    if cfg.rollout.nnodes:  # not on the devices that are counted here
        here = EngineMemory(weights=0, kv_cache=0, sleep_level=0)
    phases, offloads, memory = phases_of(cfg), cfg.offloads, trainer.memory
    awake = replace(here, sleep_level=0)
    per_token = kv_bytes_per_token(
        counts.arch, engine_type(cfg), cfg.rollout.tensor_model_parallel_size
    )
    return Estimate(
        stages=trainer.stages,
        memory=memory,
        engine=engine,
        moments=fullest_moments(phases, memory, here, offloads),
        resident=fullest_moments(phases, memory, awake, Offloads()),
        host_per_device=most_host_memory(phases, memory, here, offloads),
        saved_per_device=max(on_stage.save + on_stage.save_critic for on_stage in memory),
        num_kv_tokens=int(engine.kv_cache // per_token),
        longest=cfg.data.max_prompt_length + cfg.data.max_response_length,
        device=device_bytes(cfg),
    )


def device_bytes(cfg: RunConfig) -> float:
    """Return the memory of a device."""
    return cfg.trainer.device_memory_gib * GIB


def engine_type(cfg: RunConfig) -> str:
    """Return the type of the engines' weights."""
    return cfg.rollout.dtype or cfg.actor.megatron.dtype


def engine_memory(cfg: RunConfig, counts: ModelCounts) -> EngineMemory:
    """Return what an engine has on one of its devices."""
    rollout = cfg.rollout
    ranks, device = rollout.tensor_model_parallel_size, device_bytes(cfg)
    weights = counts.num_parameters * BYTES[engine_type(cfg)] // ranks
    kv_cache = rollout.kv_cache_memory_bytes
    if kv_cache is None:
        kv_cache = max(0, int(rollout.gpu_memory_utilization * device) - weights)
    return EngineMemory(weights=weights, kv_cache=kv_cache, sleep_level=rollout.sleep_level)


def trainer_memory(
    cfg: RunConfig,
    counts: ModelCounts,
    layout: Layout,
    *,
    largest_micro_batch: int,
    num_micro_batches: int,
) -> TrainerMemory:
    """Return the trainer's part of the estimate; arguments as of `estimate`."""
    stages = counts.actor.stages(layout)
    megatron, hf_config, cut = cfg.actor.megatron, counts.hf_config, cfg.actor.cut
    largest = cut.max_tokens if isinstance(cut, TokenBudget) else largest_micro_batch
    tokens = -(-largest // layout.cp)
    state = functools.partial(
        state_memory,
        layout=layout,
        dtype=megatron.dtype,
        use_distributed_optimizer=megatron.use_distributed_optimizer,
    )
    copied = functools.partial(
        save_memory,
        layout=layout,
        dtype=megatron.dtype,
        use_distributed_optimizer=megatron.use_distributed_optimizer,
    )
    activations = functools.partial(
        activation_memory,
        counts.arch,
        layout,
        stages,
        tokens=tokens,
        dtype=megatron.dtype,
        sequence_parallel=megatron.uses_sequence_parallel,
    )
    recomputes = megatron.override_transformer_config.get("recompute_granularity") == "full"
    critic = counts.critic.stages(layout) if counts.critic else []
    parts = (Part.PARAM, Part.GRAD, Part.OPTIMIZER)
    memory = []
    for number, stage in enumerate(stages):
        actor: dict[Part, int] = dict(zip(parts, state(stage), strict=True))
        if cfg.keeps_reference:
            actor[Part.REFERENCE] = actor[Part.PARAM]
        memory.append(
            StageMemory(
                actor=actor,
                critic=dict(zip(parts, state(critic[number]), strict=True)) if critic else {},
                activations=activations(
                    number,
                    num_micro_batches=num_micro_batches,
                    recomputes_layers=recomputes,
                ),
                logits=logit_memory(layout, number, tokens=tokens, vocab_size=hf_config.vocab_size),
                # One layer at a time is what recomputation has beside the inputs that it keeps.
                forward=activations(number, num_micro_batches=0, recomputes_layers=True),
                export=counts.export,
                save=copied(stage, saves_frozen=cfg.model.lora is None),
                save_critic=copied(critic[number], saves_frozen=True) if critic else 0,
            )
        )
    return TrainerMemory(stages=stages, memory=memory)
