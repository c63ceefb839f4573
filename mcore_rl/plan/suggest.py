"""Which layout and placement a run could have: all that fit, the fastest estimate first.

Candidates get the same numbers as in their plan: memory comes from the same `estimate`, rules from
the same checks. Trainer and engines are examined separately and then combined, since only memory
couples them. So thousands of pairs take seconds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mcore_rl.cluster.phases import NEEDS
from mcore_rl.config.checks import check_run
from mcore_rl.config.run import RunConfig, train_layout
from mcore_rl.errors import UserError
from mcore_rl.models.layout import check_engine_layout, check_layout
from mcore_rl.plan.candidates import ENGINE_SIZE, Space, Values, with_values
from mcore_rl.plan.estimate import (
    GIB,
    USABLE,
    Estimate,
    ModelCounts,
    TrainerMemory,
    assemble,
    device_bytes,
    engine_memory,
    engine_type,
    trainer_memory,
)
from mcore_rl.plan.memory import kv_bytes_per_token
from mcore_rl.plan.moments import EngineMemory, fullest_moments, phases_of
from mcore_rl.plan.step import step_lengths
from mcore_rl.plan.step_time import Speeds, Work
from mcore_rl.plan.times import generation_time, move_time, num_engines, trainer_times, work_of_step
from mcore_rl.types import Layout

NO_ENGINE = EngineMemory(weights=0, kv_cache=0, sleep_level=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A configuration that fits."""

    values: Values
    """What it sets, by key."""
    cfg: RunConfig
    layout: Layout
    estimate: Estimate
    seconds: Mapping[str, float]
    """Of each stage of a step."""

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestions:
    """All candidates that were examined."""

    fitting: Sequence[Suggestion]
    """The best of each layout and placement, fastest first."""
    impossible: Mapping[str, str]
    """By layout and placement: why no candidate of it fits."""


def work_of(cfg: RunConfig, prompt_tokens: Sequence[int]) -> Work:
    """Return the work of a step of the run, as its plan packs it.

    Args:
        cfg: the run.
        prompt_tokens: of every prompt of `data.train_files`.
    """
    return work_of_step(cfg, *step_lengths(cfg, prompt_tokens))


def suggest(
    cfg: RunConfig, counts: ModelCounts, work: Work, speeds: Speeds, fixed: Collection[str]
) -> Suggestions:
    """Return what fits, and what does not.

    Args:
        cfg: the run; need not be possible itself.
        counts: of its models.
        work: of a step.
        speeds: of the devices.
        fixed: keys that stay as they are in `cfg`.
    """
    space = Space(cfg, fixed, has_experts="num_moe_experts" in counts.arch)
    fitting: list[Suggestion] = []
    impossible: dict[str, str] = {}
    for place in space.placements():
        placed = with_values(cfg, place)
        engines = _engines(space, placed, counts, work, speeds)
        for sizes in space.layouts(placed):
            name = _name(placed, sizes)
            found, why = _of_layout(
                space, placed, {**place, **sizes}, engines, counts, work, speeds
            )
            if found is None:
                impossible[name] = why
            else:
                fitting.append(found)
    fitting.sort(key=lambda one: one.step_s)
    return Suggestions(fitting=fitting, impossible=impossible)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    """A way to divide devices among engines."""

    values: Values
    weights: int
    kv_cache: int
    holds_longest: bool
    """Whether the cache of one engine holds the longest sample."""
    seconds: float
    """Of generation."""


def _engines(
    space: Space, placed: RunConfig, counts: ModelCounts, work: Work, speeds: Speeds
) -> list[_Engine]:
    """Return the engines that the model can be divided over, the fastest first."""
    found = []
    for values in space.engines(placed):
        cfg = with_values(placed, values)
        rollout = cfg.rollout
        size, dtype = rollout.tensor_model_parallel_size, engine_type(cfg)
        try:
            check_engine_layout(counts.hf_config, size, ENGINE_SIZE)
        except UserError:
            continue
        memory = engine_memory(cfg, counts)
        per_token = kv_bytes_per_token(counts.arch, dtype, size)
        longest = cfg.data.max_prompt_length + cfg.data.max_response_length
        # Apart from the trainer nothing else binds them.
        is_whole = memory.weights + memory.kv_cache <= USABLE * device_bytes(cfg)
        holds = memory.kv_cache >= longest * per_token and (is_whole or not rollout.nnodes)
        seconds = math.inf
        if holds and num_engines(cfg):
            seconds = generation_time(cfg, counts, memory, work, speeds)
        found.append(
            _Engine(
                values=values,
                weights=memory.weights,
                kv_cache=memory.kv_cache,
                holds_longest=holds,
                seconds=seconds,
            )
        )
    return sorted(found, key=lambda engine: engine.seconds)


def _of_layout(
    space: Space,
    placed: RunConfig,
    values: Values,
    engines: Sequence[_Engine],
    counts: ModelCounts,
    work: Work,
    speeds: Speeds,
) -> tuple[Suggestion | None, str]:
    """Return the fastest candidate of one layout, or None and why there is none."""
    if not engines:
        return None, f"{ENGINE_SIZE}: no number of devices divides the model"
    laid_out = with_values(placed, values)
    megatron = laid_out.actor.megatron
    try:
        layout = train_layout(megatron, laid_out.trainer.world_size)
        is_cut = megatron.uses_sequence_parallel
        check_layout(counts.hf_config, layout, sequence_parallel=is_cut)
    except UserError as error:
        return None, str(error)
    if layout.dp > work.samples // work.updates:
        samples = work.samples // work.updates
        return None, f"{layout.dp} data-parallel ranks for the {samples} samples of an update"
    if not any(engine.holds_longest for engine in engines):
        least = min(engine.weights for engine in engines) / GIB
        return None, f"no engine holds {least:.1f} GiB of weights a device and the longest sample"
    best: tuple[float, Values, RunConfig, _Engine, TrainerMemory, Mapping[str, float]] | None = None
    fullest, least = "", math.inf
    usable = USABLE * device_bytes(placed)
    for chosen in space.training(laid_out):
        training = with_values(laid_out, chosen)
        memory = _trainer_memory(training, counts, layout, work)
        seconds = trainer_times(training, counts, layout, memory, work, speeds)
        for turn in space.turns(placed):
            turned = with_values(training, turn)
            times = {**seconds, "move": move_time(turned, memory, speeds)}
            phases, level = phases_of(turned), turned.rollout.sleep_level
            alone = fullest_moments(phases, memory.memory, NO_ENGINE, turned.offloads)
            for engine in engines:
                step_s = engine.seconds + sum(times.values())
                if not engine.holds_longest or (best is not None and step_s >= best[0]):
                    break  # the fastest come first
                here = NO_ENGINE
                if not turned.rollout.nnodes:
                    here = EngineMemory(
                        weights=engine.weights, kv_cache=engine.kv_cache, sleep_level=level
                    )
                needed, phase = max(
                    (moment.total + here.held(NEEDS[moment.phase].engine), moment.phase)
                    for moment in alone
                )
                if needed < least:
                    least = needed
                    fullest = f"{phase} needs {least / GIB:.1f} of {usable / GIB:.1f} usable GiB"
                if needed <= usable:
                    times = {"generate": engine.seconds, **times}
                    best = step_s, {**values, **chosen, **turn}, turned, engine, memory, times
    if best is None:
        return None, fullest
    _, all_values, turned, engine, memory, times = best
    cfg = with_values(turned, engine.values)
    try:
        check_run(cfg)
    except UserError as error:
        return None, str(error)
    found = Suggestion(
        values={**all_values, **engine.values},
        cfg=cfg,
        layout=layout,
        estimate=assemble(cfg, counts, memory),
        seconds=times,
    )
    return found, ""


def _trainer_memory(
    cfg: RunConfig, counts: ModelCounts, layout: Layout, work: Work
) -> TrainerMemory:
    """Return the trainer's memory; micro-batches are filled as evenly as tokens allow."""
    per_rank = work.samples / work.updates / layout.dp
    size = cfg.actor.ppo_micro_batch_size_per_gpu
    whole = cfg.actor.cut.capacity if size is None else work.mean * size
    return trainer_memory(
        cfg,
        counts,
        layout,
        largest_micro_batch=work.longest * (size or 1),
        num_micro_batches=max(1, math.ceil(per_rank * work.mean / whole)),
    )


def _name(cfg: RunConfig, sizes: Values) -> str:
    tp, pp, cp, ep, etp = sizes.values()
    name = f"tp {tp} pp {pp} cp {cp} ep {ep} etp {etp or tp}"
    rollout = cfg.rollout
    if not rollout.nnodes:
        return name
    devices = rollout.nnodes * (rollout.n_gpus_per_node or 0)
    return f"{name}, engines on {devices} devices of their own"
