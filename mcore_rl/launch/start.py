"""From a command line to a running program; shared by the commands `train` and `sft`.

The command composes and checks its configuration, then either becomes one of the processes that
torchrun started, or starts them itself on this machine.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mcore_rl.config.compose import compose_config, parse_command_line, to_yaml
from mcore_rl.config.run import (
    CriticConfig,
    RunConfig,
    SftRunConfig,
    train_layout,
    with_fetched_models,
)
from mcore_rl.durable_files import rename_whole
from mcore_rl.errors import UserError, require
from mcore_rl.launch import torchrun
from mcore_rl.launch.cluster import Cluster
from mcore_rl.observability.log_setup import setup_logging
from mcore_rl.rollout.base import EngineSpec
from mcore_rl.workers.spec import ActorSpec, ModelSpec, WorkerSpec

logger = logging.getLogger(__name__)

Config = TypeVar("Config")
StartWorkers = Callable[[WorkerSpec], torchrun.TorchrunWorkers]


def run_command(
    module: str,
    description: str,
    argv: Sequence[str],
    root: type[Config],
    check: Callable[[Config], None],
    program: Callable[[Config, StartWorkers], None],
    plan: Callable[[Config], None] | None = None,
) -> None:
    """Run one command to its end; a user's mistake is one line and exit code 2.

    Args:
        module: name for `python -m`, by which further processes are started.
        description: one line for `--help`.
        argv: arguments without the program's name.
        root: type of the configuration.
        check: cross-section rules.
        program: the controller; it starts the workers when its inputs have proved good.
        plan: what trainer.dry_run=true does in place of the program, in one process.
    """
    try:
        line = parse_command_line(f"python -m {module}", description, argv)
        config: Any = compose_config(root, line)
        if line.show:
            if line.warning:
                sys.stderr.write(f"warning: {line.warning}\n")
            sys.stdout.write(to_yaml(config))
            return
        check(config)
        _quiet_libraries()
        config = with_fetched_models(config)
        if config.trainer.dry_run:
            require(plan is not None, "trainer.dry_run", True, f"is not known to {module}")
            if plan is not None and torchrun.rank() == 0:
                setup_logging(0, "controller")
                plan(config)
            return
        world_size = config.trainer.world_size
        if not torchrun.is_launched() and world_size > 1:
            if config.trainer.nnodes > 1:
                raise UserError(
                    f"trainer.nnodes={config.trainer.nnodes} needs a launcher: start "
                    f"torchrun --nnodes {config.trainer.nnodes} ... -m {module} on every node."
                )
            sys.exit(torchrun.launch_processes(module, argv, world_size))
        setup_logging(torchrun.rank(), "controller" if torchrun.rank() == 0 else "worker")
        if line.warning and torchrun.rank() == 0:
            logger.warning("%s", line.warning)
        torchrun.run_program(world_size, _make_worker, lambda start: program(config, start))
    except Exception as error:  # noqa: BLE001  whatever it is, no process may outlive it
        torchrun.end_process(error)


def start_cluster(
    cfg: RunConfig | SftRunConfig,
    start_workers: StartWorkers,
    *,
    total_steps: int,
    temperature: float,
    with_reference: bool,
    engine: EngineSpec | None,
    critic: CriticConfig | None = None,
) -> Cluster:
    """Start all workers as `cfg` describes them.

    Args:
        cfg: the run.
        start_workers: given to the program by `run_command`.
        total_steps: steps of the run.
        temperature: of the logits.
        with_reference: keep a frozen copy of the initial weights.
        engine: None where nothing is generated.
        critic: None where no values are needed.
    """
    layout = train_layout(cfg.actor.megatron, cfg.trainer.world_size)
    megatron = cfg.actor.megatron
    actor = ActorSpec(
        model_path=cfg.model.folder,
        megatron=megatron,
        optim=cfg.actor.optim,
        grad_clip=cfg.actor.grad_clip,
        total_steps=total_steps,
        temperature=temperature,
        with_reference=with_reference,
        lora=cfg.model.lora,
    )
    critic_spec = critic and ModelSpec(
        model_path=critic.model.folder or actor.model_path,
        megatron=megatron,
        optim=critic.optim,
        grad_clip=critic.grad_clip,
        total_steps=total_steps,
    )
    workers = start_workers(
        WorkerSpec(layout=layout, actor=actor, critic=critic_spec, engine=engine)
    )
    critic_cut = critic and critic.cut_over(megatron.context_parallel_size)
    return Cluster(workers, layout, cfg.actor.cut, critic_cut)


def export_model(cluster: Cluster, run_dir: Path) -> None:
    """Write the trained weights to `hf_model` in the run folder; the folder appears when whole.

    One that an earlier end of this same run wrote stays until then. Killed between two renames, the
    run leaves it as `hf_model.previous`, and the next call puts it back.
    """
    final, partial, previous = (run_dir / f"hf_model{end}" for end in ("", ".partial", ".previous"))
    if previous.exists() and not final.exists():
        previous.rename(final)
    for leftover in (partial, previous):
        if leftover.exists():
            shutil.rmtree(leftover)
    cluster.export_hf(str(partial))
    if final.exists():
        final.rename(previous)
    rename_whole(partial, final)
    shutil.rmtree(previous, ignore_errors=True)
    sys.stdout.write(f"model   {final}\n")


def _make_worker(spec: WorkerSpec, device: Any) -> Any:
    from mcore_rl.workers.worker import Worker  # Megatron and vLLM: seconds, so only when needed

    return Worker(spec, device)


def _quiet_libraries() -> None:
    """Keep libraries off the network and off the terminal; children inherit it."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron's overlap relies on it
    }.items():
        os.environ.setdefault(name, value)
    # Megatron says at each import that Apex and Transformer Engine are absent, and torch renames
    # collectives that Megatron calls: nothing that a user could mend.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|vllm)\.")
