"""From the configuration to the placement and to what workers are built from."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.placement import Placement, colocated, engines_apart, servers_apart
from mcore_rl.config.run import CriticConfig, RunConfig, SftRunConfig, train_layout
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.observability.log_setup import log_to_file
from mcore_rl.observability.run_folder import LOGS
from mcore_rl.rollout.base import EngineSpec
from mcore_rl.workers.spec import ActorSpec, EngineWorkerSpec, ModelSpec, WorkerSpec

logger = logging.getLogger(__name__)


def placement_of(cfg: RunConfig | SftRunConfig) -> Placement:
    """Return where the processes of a run stand."""
    layout = train_layout(cfg.actor.megatron, cfg.trainer.world_size)
    per_node = cfg.trainer.n_gpus_per_node
    if not isinstance(cfg, RunConfig):
        return colocated(layout, per_node, None)
    rollout, size = cfg.rollout, cfg.rollout.tensor_model_parallel_size
    if rollout.host == "in_process":
        return colocated(layout, per_node, size)
    if rollout.host == "server":
        return servers_apart(layout, per_node, len(rollout.server_urls))
    return engines_apart(layout, per_node, size, rollout.nnodes, rollout.n_gpus_per_node or 0)


def start_cluster(
    cfg: RunConfig | SftRunConfig,
    workers: ChannelWorkers,
    *,
    total_steps: int,
    temperature: float,
    engine: EngineSpec | None,
    critic: CriticConfig | None = None,
) -> Cluster:
    """Start all workers as `cfg` describes them.

    Args:
        cfg: the run.
        workers: their processes.
        total_steps: steps of the run.
        temperature: of the logits.
        engine: None where nothing is generated.
        critic: None where no values are needed.
    """
    megatron = cfg.actor.megatron
    actor = ActorSpec(
        model_path=str(cfg.model.path),
        megatron=megatron,
        optim=cfg.actor.optim,
        grad_clip=cfg.actor.grad_clip,
        total_steps=total_steps,
        temperature=temperature,
        with_reference=isinstance(cfg, RunConfig) and cfg.keeps_reference,
        lora=cfg.model.lora,
    )
    critic_spec = critic and ModelSpec(
        model_path=critic.model.path or actor.model_path,
        megatron=megatron,
        optim=critic.optim,
        grad_clip=critic.grad_clip,
        total_steps=total_steps,
    )
    if isinstance(cfg, RunConfig) and cfg.ref.megatron.param_offload and not cfg.keeps_reference:
        logger.warning("not read here: ref.megatron.param_offload (no frozen copy is kept)")
    placement = placement_of(cfg)
    engines = {}
    if engine is not None:
        urls = engine.config.server_urls or [""] * len(placement.engines)
        engines = {
            place.engine: EngineWorkerSpec(
                engine=replace(engine, is_apart=True, url=urls[place.engine]),
                number=place.engine,
            )
            for place in placement.engines
        }
    spec = WorkerSpec(
        placement=placement,
        actor=actor,
        critic=critic_spec,
        engine=engine,
        offloads=cfg.offloads,
    )
    logs = Path(cfg.trainer.default_local_dir) / LOGS
    log_to_file(logs, 0, "controller")
    workers.start(spec, engines, logs)
    critic_cut = critic and critic.cut_over(megatron.context_parallel_size)
    return Cluster.of(
        workers,
        placement,
        cfg.actor.cut,
        critic_cut,
        offloads=cfg.offloads,
        sleep_level=engine.config.sleep_level if engine else 0,
        max_engine_restarts=engine.config.max_engine_restarts if engine else 0,
    )
