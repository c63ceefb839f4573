"""From the configuration to the placement and to what workers are built from."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.placement import Placement, colocated, engines_apart, servers_apart
from mcore_rl.config.run import CriticConfig, RunConfig, SftRunConfig, train_layout
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.loop.inputs import RunInputs
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


def placement_of_trainers(cfg: RunConfig) -> Placement:
    """Return where the train workers of a run stand, without its engines."""
    layout = train_layout(cfg.actor.megatron, cfg.trainer.world_size)
    return colocated(layout, cfg.trainer.n_gpus_per_node, None)


def start_run(
    cfg: RunConfig,
    workers: ChannelWorkers,
    inputs: RunInputs,
    run_dir: Path,
    placement: Placement,
) -> Cluster:
    """Start the workers of a reinforcement-learning run.

    Args:
        cfg: the run.
        workers: their processes.
        inputs: of the run.
        run_dir: its folder.
        placement: where they stand.
    """
    from mcore_rl.models.spec import engine_overrides

    longest = cfg.data.max_prompt_length + cfg.data.max_response_length
    return start_cluster(
        cfg,
        workers,
        total_steps=inputs.total_steps,
        temperature=cfg.rollout.temperature,
        engine=EngineSpec(
            model_path=str(cfg.model.path),
            dtype=cfg.rollout.dtype or cfg.actor.megatron.dtype,
            max_model_len=cfg.rollout.max_model_len or longest,
            stop_token_ids=inputs.stop_token_ids,
            config=cfg.rollout,
            run_folder=str(run_dir),
            routing=inputs.routing,
            with_text=True,
            adapters=inputs.adapters,
            config_overrides=engine_overrides(cfg.model.folder),
        ),
        critic=cfg.critic if cfg.has_critic else None,
        placement=placement,
    )


def start_cluster(
    cfg: RunConfig | SftRunConfig,
    workers: ChannelWorkers,
    *,
    total_steps: int,
    temperature: float,
    engine: EngineSpec | None,
    critic: CriticConfig | None = None,
    placement: Placement | None = None,
) -> Cluster:
    """Start all workers as `cfg` describes them.

    Args:
        cfg: the run.
        workers: their processes.
        total_steps: steps of the run.
        temperature: of the logits.
        engine: None where nothing is generated.
        critic: None where no values are needed.
        placement: where they stand; None: as `cfg` has it.
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
    placement = placement or placement_of(cfg)
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
