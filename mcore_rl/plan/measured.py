"""The memory of a run next to the estimate of its plan, written into the run folder at its end.

On CUDA both count a device, the engines on it included. On CPU they count the resident set of a
train worker: host memory and "device" are one there, an engine counts where it lives in the worker,
and what sleeps stays (vLLM on CPU frees nothing).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mcore_rl.cluster.memory import Measured
from mcore_rl.cluster.phases import Phase
from mcore_rl.config.checks import overrides_leave_alone_what_others_decide
from mcore_rl.config.run import RunConfig, train_layout
from mcore_rl.durable_files import write_whole
from mcore_rl.models.spec import load_hf_config
from mcore_rl.observability.run_folder import MEMORY_FILE
from mcore_rl.plan.estimate import GIB, Estimate, ModelCounts, estimate
from mcore_rl.plan.memory import StageMemory
from mcore_rl.plan.moments import own
from mcore_rl.plan.step import plan_step
from mcore_rl.rollout.base import CPU_KV_CACHE_BYTES, ENGINES

logger = logging.getLogger(__name__)

HELD = "end of the run"
"""Row of the memory that stays when all work is done and freed memory has been given back."""


def write_memory(
    cfg: RunConfig, prompt_tokens: Sequence[int], found: Measured | None, run_dir: Path
) -> None:
    """Write the rows (estimated and measured GiB, by phase) into the run folder, and log them.

    Args:
        cfg: the run.
        prompt_tokens: of every prompt of `data.train_files`.
        found: None: nothing was measured, and nothing is written.
        run_dir: of the run.
    """
    if found is None:
        return
    try:
        planned = _planned(cfg, prompt_tokens)
    except Exception as error:  # noqa: BLE001  the run is done, and a plan is only beside it
        logger.warning("there is no plan to compare the measured memory with: %s", error)
        return
    rows = memory_rows(cfg, planned, found)
    what = "a worker's resident set" if found.is_of_host else "a device"
    logger.info("memory of %s in GiB, estimated and measured at most:", what)
    for name, (estimated, measured) in rows.items():
        logger.info("  %-16s %8.2f %8.2f", name, estimated, measured)
    record = {
        "what": what,
        "rows": [
            {"phase": name, "estimated_gib": estimated, "measured_gib": measured}
            for name, (estimated, measured) in rows.items()
        ],
    }
    write_whole(run_dir / MEMORY_FILE, json.dumps(record, indent=1) + "\n")


def _planned(cfg: RunConfig, prompt_tokens: Sequence[int]) -> Estimate:
    """Return what `mcore-rl plan` says of the run.

    Raises:
        UserError: for options that a plan does not know.
    """
    overrides_leave_alone_what_others_decide(
        replace(cfg, trainer=replace(cfg.trainer, dry_run=True))
    )
    counts = ModelCounts(cfg, load_hf_config(cfg.model.folder))
    layout = train_layout(cfg.actor.megatron, cfg.trainer.world_size)
    step = plan_step(cfg, layout, prompt_tokens)
    return estimate(
        cfg,
        counts,
        layout,
        largest_micro_batch=step.largest_micro_batch,
        num_micro_batches=max(step.micro_batches),
    )


def memory_rows(
    cfg: RunConfig, planned: Estimate, found: Measured
) -> Mapping[str, tuple[float, float]]:
    """Return estimated and measured GiB of each phase that there was, and of the end."""
    if found.is_of_host:
        expected = {phase: _on_host(cfg, planned, phase) for phase in found.peaks}
        stays = _on_host(cfg, planned, None)
    else:
        expected = {moment.phase: moment.total for moment in planned.moments}
        last = planned.moments[-1]
        stays = last.total - last.own
    rows = {
        str(phase): (expected[phase] / GIB, peak / GIB)
        for phase, peak in found.peaks.items()
        if phase in expected
    }
    return {**rows, HELD: (stays / GIB, found.held / GIB)}


def _on_host(cfg: RunConfig, planned: Estimate, phase: Phase | None) -> int:
    """Return the bytes of the fullest worker on CPU, with what the work of a phase needs and the
    copies that checkpoints are written from: the critic's are made while the actor's are there."""
    engine = 0
    rollout = cfg.rollout
    # An engine that does not cut heads has no model.
    if rollout.host == "in_process" and ENGINES.get(rollout.name).cuts_heads:
        cache = rollout.kv_cache_memory_bytes or CPU_KV_CACHE_BYTES
        engine = planned.engine.weights + cache

    def of(stage: StageMemory) -> int:
        state = sum(stage.actor.values()) + sum(stage.critic.values())
        copies = stage.save if phase in (Phase.SAVE, Phase.SAVE_CRITIC) else 0
        copies += stage.save_critic if phase is Phase.SAVE_CRITIC else 0
        return state + copies + (own(phase, stage) if phase else 0)

    return engine + max(map(of, planned.memory))
