"""The plan of a run as text: model, placement, one step, memory."""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

from transformers import PreTrainedConfig

from mcore_rl.cluster.placement import colocated, expert_dp_size
from mcore_rl.config.run import RunConfig, train_layout
from mcore_rl.data.packing import TokenBudget
from mcore_rl.data.vocabulary import check_tokenizer
from mcore_rl.dtypes import BYTES
from mcore_rl.metrics import to_floats
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
from mcore_rl.plan.moments import EngineMemory, fullest_moments, most_host_memory, phases_of
from mcore_rl.plan.parameters import StageParameters, model_size, stage_parameters
from mcore_rl.plan.step import StepPlan, plan_step
from mcore_rl.run.inputs import check_model
from mcore_rl.types import Layout, Offloads, Part

GIB = 2**30
MAX_RANKS_SHOWN = 128
USABLE = 0.9
"""Share of a device for what is estimated; the rest is for what `memory.py` does not count."""


def write_plan(cfg: RunConfig) -> None:
    """Write the plan of the run to stdout.

    Raises:
        UserError: for whatever the run would refuse before it starts, weights and rewards aside.
    """
    hf_config = check_model(cfg)
    check_tokenizer(cfg.model.folder, hf_config.vocab_size)
    layout = train_layout(cfg.actor.megatron, cfg.trainer.world_size)
    step = plan_step(cfg, layout)
    stages = stage_parameters(
        hf_config,
        layout,
        routers_are_frozen=cfg.actor.megatron.moe_router_freeze,
        lora=cfg.model.lora,
    )
    memory = stage_memory(cfg, hf_config, layout, stages, step)
    lines = [
        *_placement_lines(cfg, layout),
        "",
        *_step_lines(cfg, layout, step),
        "",
        *_memory_lines(cfg, hf_config, stages, memory),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def stage_memory(
    cfg: RunConfig,
    hf_config: PreTrainedConfig,
    layout: Layout,
    stages: Sequence[StageParameters],
    step: StepPlan,
) -> list[StageMemory]:
    """Return what a device of each pipeline stage has at one time or another."""
    megatron = cfg.actor.megatron
    arch = model_family(hf_config).transformer_kwargs(hf_config)
    cut = cfg.actor.cut
    # A budget is planned for in full: some step will fill it.
    largest = cut.max_tokens if isinstance(cut, TokenBudget) else step.largest_micro_batch
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
        arch,
        layout,
        stages,
        tokens=tokens,
        dtype=megatron.dtype,
        sequence_parallel=megatron.uses_sequence_parallel,
    )
    recomputes = megatron.override_transformer_config.get("recompute_granularity") == "full"
    export = export_memory(model_family(hf_config).entries(hf_config), megatron.dtype)
    critic = _critic_parameters(cfg, layout) if cfg.has_critic else []
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
                    num_micro_batches=max(step.micro_batches),
                    recomputes_layers=recomputes,
                ),
                logits=logit_memory(layout, number, tokens=tokens, vocab_size=hf_config.vocab_size),
                # One layer at a time is what recomputation has beside the inputs that it keeps.
                forward=activations(number, num_micro_batches=0, recomputes_layers=True),
                export=export,
                save=copied(stage, saves_frozen=cfg.model.lora is None),
                save_critic=copied(critic[number], saves_frozen=True) if critic else 0,
            )
        )
    return memory


def _critic_parameters(cfg: RunConfig, layout: Layout) -> list[StageParameters]:
    hf_config = load_hf_config(cfg.critic.model.folder or cfg.model.folder)
    return stage_parameters(hf_config, layout, has_output_layer=False)


def _placement_lines(cfg: RunConfig, layout: Layout) -> Iterable[str]:
    trainer, engine_ranks = cfg.trainer, cfg.rollout.tensor_model_parallel_size
    yield (
        f"placement   {layout.world_size} processes on {trainer.nnodes} nodes: tp {layout.tp} x cp "
        f"{layout.cp} x dp {layout.dp} x pp {layout.pp}"
        + (f" (vpp {layout.vpp})" if layout.vpp > 1 else "")
        + f"; experts etp {layout.etp} x ep {layout.ep} x dp {expert_dp_size(layout)} x pp "
        f"{layout.pp}; {_engines(cfg)}"
    )
    yield "  node  rank    tp    cp    dp    pp    ep   etp   edp  engine"
    for place in colocated(layout, layout.world_size, None).places[:MAX_RANKS_SHOWN]:
        numbers = (
            place.rank // trainer.n_gpus_per_node,
            *(place.rank, place.tp, place.cp, place.dp, place.pp),
            *(place.ep, place.etp, place.expert_dp),
        )
        row = "".join(f"{number:6d}" for number in numbers)
        yield row if cfg.rollout.nnodes else f"{row}{place.rank // engine_ranks:8d}"
    if layout.world_size > MAX_RANKS_SHOWN:
        yield f"  ... and {layout.world_size - MAX_RANKS_SHOWN} more"


def _engines(cfg: RunConfig) -> str:
    rollout, devices = cfg.rollout, cfg.trainer.world_size
    where = "" if rollout.host == "in_process" else " in processes of their own"
    if rollout.nnodes:
        devices = rollout.nnodes * (rollout.n_gpus_per_node or 0)
        where += f" on {devices} devices of their own"
    size = rollout.tensor_model_parallel_size
    return f"{devices // size} engines of {size}{where}"


def _step_lines(cfg: RunConfig, layout: Layout, step: StepPlan) -> Iterable[str]:
    metrics = to_floats(step.metrics)
    updates = len(step.micro_batches) * cfg.actor.ppo_epochs
    yield (
        f"step        {len(step.prompt_tokens)} prompts x {cfg.rollout.n} samples, {updates} "
        f"updates of {cfg.actor.ppo_mini_batch_size} prompts; response lengths of the fake engine"
    )
    for name, lengths in (("prompt", step.prompt_tokens), ("response", step.response_tokens)):
        yield (f"  {name + ' tokens':26s} mean {statistics.fmean(lengths):.0f}, max {max(lengths)}")
    yield f"  {'tokens':26s} {metrics['batch/tokens']:.0f}"
    fewest, most = min(step.micro_batches), max(step.micro_batches)
    counts = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    yield f"  {'micro-batches per update':26s} {counts} on each of {layout.dp} data-parallel ranks"
    yield f"  {'packing fraction':26s} {metrics['batch/packing_frac']:.3f}"
    yield f"  {'dp imbalance fraction':26s} {metrics['batch/dp_imbalance_frac']:.3f}"


def _memory_lines(
    cfg: RunConfig,
    hf_config: PreTrainedConfig,
    stages: Sequence[StageParameters],
    memory: Sequence[StageMemory],
) -> Iterable[str]:
    num_parameters = model_size(hf_config)
    yield (
        f"memory      {num_parameters:,} parameters in {cfg.actor.megatron.dtype}; an estimate, in "
        "GiB per device of each pipeline stage"
    )
    yield _STAGE_HEADER
    for number, (stage, held) in enumerate(zip(stages, memory, strict=True)):
        of_actor = [held.actor.get(part, 0) for part in Part]
        cells = [*of_actor, sum(held.critic.values()), held.activations, held.logits]
        yield f"{number:7d}{len(stage.layers):8d}{stage.total:15,d}" + "".join(
            f"{size / GIB:12.2f}" for size in cells
        )
    yield ""
    yield from _moment_lines(cfg, hf_config, num_parameters, memory)


_STAGE_HEADER = "  stage  layers     parameters" + "".join(
    f"{name:>12s}"
    for name in (
        *("weights", "gradients", "optimizer", "reference"),
        *("critic", "activations", "logits"),
    )
)


def _moment_lines(
    cfg: RunConfig,
    hf_config: PreTrainedConfig,
    num_parameters: int,
    memory: Sequence[StageMemory],
) -> Iterable[str]:
    engine_dtype = cfg.rollout.dtype or cfg.actor.megatron.dtype
    engine_ranks, device = cfg.rollout.tensor_model_parallel_size, cfg.trainer.device_memory_gib
    weights = num_parameters * BYTES[engine_dtype] // engine_ranks
    kv_cache = cfg.rollout.kv_cache_memory_bytes
    if kv_cache is None:
        kv_cache = max(0, int(cfg.rollout.gpu_memory_utilization * device * GIB) - weights)
    level = cfg.rollout.sleep_level
    engine = EngineMemory(weights=weights, kv_cache=kv_cache, sleep_level=level)
    if cfg.rollout.nnodes:  # not on the devices that are counted here
        engine = EngineMemory(weights=0, kv_cache=0, sleep_level=0)
    phases, offloads = phases_of(cfg), cfg.offloads
    moments = fullest_moments(phases, memory, engine, offloads)
    resident = fullest_moments(phases, memory, replace(engine, sleep_level=0), Offloads())
    names = [f"actor.{part}" for part in Part if part in offloads.actor]
    names += [f"critic.{part}" for part in Part if part in offloads.critic and cfg.has_critic]
    yield (
        "moments     what the fullest device holds in each, in GiB; in host memory while not "
        f"needed: {', '.join(names) or 'nothing'}; rollout.sleep_level={level}"
    )
    yield (
        "  phase              actor   reference      critic     its own      engine         all"
        "    resident"
    )
    for moment, all_here in zip(moments, resident, strict=True):
        held = (moment.actor, moment.reference, moment.critic, moment.own, moment.engine)
        cells = [*held, moment.total, all_here.total]
        yield f"  {moment.phase:12s}" + "".join(f"{size / GIB:12.2f}" for size in cells)
    yield "  resident: if nothing were offloaded and engines never slept"
    arch = model_family(hf_config).transformer_kwargs(hf_config)
    longest = cfg.data.max_prompt_length + cfg.data.max_response_length
    num_tokens = int(kv_cache // kv_bytes_per_token(arch, engine_dtype, engine_ranks))
    yield (
        f"  engine: {weights / GIB:.2f} GiB of weights, {kv_cache / GIB:.2f} GiB of kv cache: "
        f"{num_tokens:,} tokens, {num_tokens // longest} sequences of {longest} at a "
        f"time (rollout.max_num_seqs={cfg.rollout.max_num_seqs})"
    )
    host = most_host_memory(phases, memory, engine, offloads) * cfg.trainer.n_gpus_per_node
    yield f"  host memory: {host / GIB:.1f} GiB per node for what is offloaded"
    copies = max(held.save + held.save_critic for held in memory) * cfg.trainer.n_gpus_per_node
    yield f"  checkpoint: {copies / GIB:.1f} GiB of host memory per node until it is written"
    fullest = max(moments, key=lambda moment: moment.total)
    fits = fullest.total <= USABLE * device * GIB and num_tokens >= longest
    yield (
        f"  {'fits' if fits else 'does not fit'}: {fullest.total / GIB:.1f} of {device:g} GiB "
        f"(trainer.device_memory_gib) in {fullest.phase}, of which a tenth is left for what is not "
        "counted"
    )
