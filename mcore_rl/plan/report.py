"""The plan of a run as text: model, placement, one step, memory."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable

from mcore_rl.cluster.placement import colocated, expert_dp_size
from mcore_rl.config.run import RunConfig, train_layout
from mcore_rl.data.vocabulary import check_tokenizer
from mcore_rl.metrics import to_floats
from mcore_rl.plan.estimate import GIB, Estimate, ModelCounts, estimate
from mcore_rl.plan.overlap_report import generates_beside_training, overlap_lines
from mcore_rl.plan.step import StepPlan, plan_step, prompt_lengths
from mcore_rl.plan.times import num_engines
from mcore_rl.run.inputs import check_model
from mcore_rl.types import Layout, Part

MAX_RANKS_SHOWN = 128


def write_plan(cfg: RunConfig) -> None:
    """Write the plan of the run to stdout.

    Raises:
        UserError: for whatever the run would refuse before it starts, weights and rewards aside.
    """
    hf_config = check_model(cfg)
    check_tokenizer(cfg.model.folder, hf_config.vocab_size)
    layout = train_layout(cfg.actor.megatron, cfg.trainer.world_size)
    step = plan_step(cfg, layout, prompt_lengths(cfg))
    counts = ModelCounts(cfg, hf_config)
    found = estimate(
        cfg,
        counts,
        layout,
        largest_micro_batch=step.largest_micro_batch,
        num_micro_batches=max(step.micro_batches),
    )
    lines = [
        *_placement_lines(cfg, layout),
        "",
        *_step_lines(cfg, layout, step),
        "",
        *_memory_lines(cfg, counts.num_parameters, found),
        "",
        *_moment_lines(cfg, found),
    ]
    if generates_beside_training(cfg):
        lines += ["", *overlap_lines(cfg, counts, layout, step, found)]
    sys.stdout.write("\n".join(lines) + "\n")


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
    rollout = cfg.rollout
    where = "" if rollout.host == "in_process" else " in processes of their own"
    if rollout.nnodes:
        devices = rollout.nnodes * (rollout.n_gpus_per_node or 0)
        where += f" on {devices} devices of their own"
    return f"{num_engines(cfg)} engines of {rollout.tensor_model_parallel_size}{where}"


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


def _memory_lines(cfg: RunConfig, num_parameters: int, found: Estimate) -> Iterable[str]:
    yield (
        f"memory      {num_parameters:,} parameters in {cfg.actor.megatron.dtype}; an estimate, in "
        "GiB per device of each pipeline stage"
    )
    yield _STAGE_HEADER
    for number, (stage, on_stage) in enumerate(zip(found.stages, found.memory, strict=True)):
        of_actor = [on_stage.actor.get(part, 0) for part in Part]
        cells = [*of_actor, sum(on_stage.critic.values()), on_stage.activations, on_stage.logits]
        yield f"{number:7d}{len(stage.layers):8d}{stage.total:15,d}" + "".join(
            f"{size / GIB:12.2f}" for size in cells
        )


_STAGE_HEADER = "  stage  layers     parameters" + "".join(
    f"{name:>12s}"
    for name in (
        *("weights", "gradients", "optimizer", "reference"),
        *("critic", "activations", "logits"),
    )
)


def _moment_lines(cfg: RunConfig, found: Estimate) -> Iterable[str]:
    offloads = cfg.offloads
    names = [f"actor.{part}" for part in Part if part in offloads.actor]
    names += [f"critic.{part}" for part in Part if part in offloads.critic and cfg.has_critic]
    yield (
        "moments     what the fullest device holds in each, in GiB; in host memory while not "
        f"needed: {', '.join(names) or 'nothing'}; rollout.sleep_level={cfg.rollout.sleep_level}"
    )
    yield (
        "  phase              actor   reference      critic     its own      engine         all"
        "    resident"
    )
    for moment, all_here in zip(found.moments, found.resident, strict=True):
        parts_here = (moment.actor, moment.reference, moment.critic, moment.own, moment.engine)
        cells = [*parts_here, moment.total, all_here.total]
        yield f"  {moment.phase:12s}" + "".join(f"{size / GIB:12.2f}" for size in cells)
    yield "  resident: if nothing were offloaded and engines never slept"
    engine, num_tokens, longest = found.engine, found.num_kv_tokens, found.longest
    yield (
        f"  engine: {engine.weights / GIB:.2f} GiB of weights, {engine.kv_cache / GIB:.2f} GiB of "
        f"kv cache: {num_tokens:,} tokens, {num_tokens // longest} sequences of {longest} at a "
        f"time (rollout.max_num_seqs={cfg.rollout.max_num_seqs})"
    )
    host = found.host_per_device * cfg.trainer.n_gpus_per_node
    yield f"  host memory: {host / GIB:.1f} GiB per node for what is offloaded"
    copies = found.saved_per_device * cfg.trainer.n_gpus_per_node
    yield f"  checkpoint: {copies / GIB:.1f} GiB of host memory per node until it is written"
    fullest, device = found.fullest, cfg.trainer.device_memory_gib
    fits = "fits" if found.fits else "does not fit"
    yield (
        f"  {fits}: {fullest.total / GIB:.1f} of {device:g} GiB (trainer.device_memory_gib) in "
        f"{fullest.phase}, of which a tenth is left for what is not counted"
    )
