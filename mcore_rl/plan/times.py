"""How long the stages of a step take as a run is laid out: measured by the run that its folder
holds, or estimated by the formulas of `step_time.py`."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_rl.config.run import RunConfig
from mcore_rl.observability.jsonl import read_metrics
from mcore_rl.observability.run_folder import METRICS_FILE
from mcore_rl.plan.estimate import ModelCounts, TrainerMemory, engine_type
from mcore_rl.plan.memory import kv_bytes_per_token
from mcore_rl.plan.moments import EngineMemory
from mcore_rl.plan.step_time import (
    Speeds,
    Trainer,
    Work,
    decode_time,
    forward_time,
    sync_time,
    train_time,
)
from mcore_rl.types import Layout, Part


def num_engines(cfg: RunConfig) -> int:
    """Return how many engines a run has."""
    rollout, devices = cfg.rollout, cfg.trainer.world_size
    if rollout.server_urls:
        return len(rollout.server_urls)
    if rollout.nnodes:
        devices = rollout.nnodes * (rollout.n_gpus_per_node or 0)
    return devices // rollout.tensor_model_parallel_size


def work_of_step(cfg: RunConfig, prompts: Sequence[int], responses: Sequence[int]) -> Work:
    """Return the work of a step of the run.

    Args:
        cfg: the run.
        prompts: tokens of each of the step.
        responses: tokens of each, prompt by prompt.
    """
    updates, epochs = len(prompts) // cfg.actor.ppo_mini_batch_size, cfg.actor.ppo_epochs
    passes = [updates * epochs > 1, cfg.needs_reference, cfg.has_critic]
    return Work.of(
        prompts,
        responses,
        updates=max(1, updates),
        epochs=epochs,
        passes=sum(passes),
        trained=2 if cfg.has_critic else 1,
    )


def slots(cfg: RunConfig, counts: ModelCounts, memory: EngineMemory, work: Work) -> int:
    """Return how many requests of the mean length an engine runs at a time; 0: its cache holds
    none."""
    size = cfg.rollout.tensor_model_parallel_size
    per_token = kv_bytes_per_token(counts.arch, engine_type(cfg), size)
    return min(cfg.rollout.max_num_seqs, int(memory.kv_cache / per_token / work.mean))


def generation_time(
    cfg: RunConfig, counts: ModelCounts, memory: EngineMemory, work: Work, speeds: Speeds
) -> float:
    """Return the seconds in which all engines answer the prompts of a step; each must hold a
    request."""
    size, dtype = cfg.rollout.tensor_model_parallel_size, engine_type(cfg)
    return decode_time(
        counts.timed,
        work,
        speeds,
        engine=size,
        num_engines=num_engines(cfg),
        sequences=slots(cfg, counts, memory, work),
        kv_bytes=kv_bytes_per_token(counts.arch, dtype, size),
        dtype=dtype,
    )


def trainer_times(
    cfg: RunConfig,
    counts: ModelCounts,
    layout: Layout,
    memory: TrainerMemory,
    work: Work,
    speeds: Speeds,
) -> Mapping[str, float]:
    """Return the seconds of the trainer's stages of a step, what is moved to the host aside."""
    actor = cfg.actor
    size = actor.ppo_micro_batch_size_per_gpu
    overrides = actor.megatron.override_transformer_config
    trainer = Trainer(
        layout=layout,
        devices_per_node=cfg.trainer.n_gpus_per_node,
        stages=memory.stages,
        optimizer_bytes=max(stage.actor[Part.OPTIMIZER] for stage in memory.memory),
        budget=actor.cut.capacity if size is None else int(work.mean * size),
        recomputes=overrides.get("recompute_granularity") == "full",
        adapters_only=cfg.model.lora is not None,
        dtype=actor.megatron.dtype,
    )
    model, is_apart = counts.timed, cfg.rollout.nnodes > 0
    forward = forward_time(model, work, speeds, trainer)
    return {
        "forward": work.passes * forward,
        "train": work.trained * work.epochs * train_time(model, work, speeds, trainer),
        "sync": sync_time(model, speeds, trainer, is_apart=is_apart, dtype=engine_type(cfg)),
    }


def move_time(cfg: RunConfig, memory: TrainerMemory, speeds: Speeds) -> float:
    """Return the seconds in which what is offloaded leaves and comes back, once a step."""
    offloads = cfg.offloads
    moved = max(
        sum(size for part, size in stage.actor.items() if part in offloads.actor)
        + sum(size for part, size in stage.critic.items() if part in offloads.critic)
        for stage in memory.memory
    )
    return 2 * moved / speeds.host


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTimes:
    """Seconds of the stages, medians over steps of a run, and its responses."""

    num_steps: int
    generate: float
    """Of a step's prompts: what the trainer waited for them or, where that was less, what engines
    were busy for a step."""
    reward: float
    train: float
    """All but generation, rewards, sync and checkpoint."""
    sync: float
    mean: float
    """Tokens of a response."""
    longest: float
    """Tokens of the longest response of a step; the mean over steps, as the other."""


def measured_times(run_dir: Path) -> MeasuredTimes | None:
    """Return the times of a run's steps, without steps that validate and without the first, which
    includes start-up; None if its folder has no such step.

    Raises:
        UserError: if its metrics cannot be read.
    """
    file = run_dir / METRICS_FILE
    lines = [line for line in read_metrics(file) if _tells(line)] if file.exists() else []

    def median(value: Callable[[Mapping[str, float]], float]) -> float:
        return statistics.median(value(line) for line in lines)

    def busy(line: Mapping[str, float]) -> float:
        return max(line["time/rollout"], line["perf/engines_busy_frac"] * line["time/step"])

    def rest(line: Mapping[str, float]) -> float:
        others = ("rollout", "reward", "weight_sync", "checkpoint")
        return line["time/step"] - sum(line.get(f"time/{name}", 0.0) for name in others)

    if not lines:
        return None
    return MeasuredTimes(
        num_steps=len(lines),
        generate=median(busy),
        reward=median(lambda line: line["time/reward"]),
        train=median(rest),
        sync=median(lambda line: line["time/weight_sync"]),
        mean=statistics.fmean(line["rollout/response_tokens/mean"] for line in lines),
        longest=statistics.fmean(line["rollout/response_tokens/max"] for line in lines),
    )


def _tells(line: Mapping[str, float]) -> bool:
    """Return whether a line of metrics has the needed times."""
    needed = [line.get(key, math.nan) for key in _NEEDED]
    return line["step"] > 0 and "time/eval" not in line and all(0 < x < math.inf for x in needed)


_NEEDED = {
    *(f"time/{stage}" for stage in ("step", "rollout", "reward", "weight_sync")),
    *("perf/engines_busy_frac", "rollout/response_tokens/mean", "rollout/response_tokens/max"),
}


def long_tailed(
    num: int, mean: float, longest: float, most: float, source: random.Random
) -> list[float]:
    """Return so many lognormal draws.

    Args:
        num: of draws.
        mean: of them.
        longest: what the longest of so many is expected to be.
        most: what none exceeds; the mean is then a little less.
        source: of the draws.
    """
    rare = statistics.NormalDist().inv_cdf(1 - 0.5 / num)  # the longest, in standard deviations
    # It is mean * exp(rare * sigma - sigma^2 / 2), at most mean * exp(rare^2 / 2).
    sigma = rare - math.sqrt(max(0.0, rare**2 - 2 * math.log(longest / mean)))
    mu = math.log(mean) - sigma**2 / 2
    return [min(most, source.lognormvariate(mu, sigma)) for _ in range(num)]
