"""The runs that checks start: their configuration, and whether they fit model and machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mcore_rl.config.checks import (
    engines_divide_the_devices,
    parallel_sizes_divide_the_workers,
    pipelines_are_interleaved_only_with_stages,
    weights_reach_the_engines,
)
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig, train_layout
from mcore_rl.errors import require
from mcore_rl.models.layout import check_engine_layout, check_layout


def quoted(path: Path) -> str:
    """Return a path as a value that Hydra reads back whatever characters it has."""
    return "'" + str(path.absolute()).replace("'", r"\'") + "'"


def check_sizes(cfg: RunConfig) -> None:
    """Raise a UserError if the sizes of trainer and engines cannot stand together."""
    parallel_sizes_divide_the_workers(cfg)
    engines_divide_the_devices(cfg)
    weights_reach_the_engines(cfg)
    pipelines_are_interleaved_only_with_stages(cfg)


def check_fits(
    module: str, overrides: Sequence[str], hf_config: Any, max_processes: int | None
) -> None:
    """Raise a UserError unless a run divides the model and fits on this machine.

    Args:
        module: of the run.
        overrides: its configuration.
        hf_config: of the model.
        max_processes: None: as many as there are GPUs, or cores and at least 4.
    """
    cfg = compose_config(RunConfig, parse_command_line(module, "", overrides))
    check_sizes(cfg)
    check_layout(
        hf_config,
        train_layout(cfg.actor.megatron, cfg.trainer.world_size),
        sequence_parallel=cfg.actor.megatron.uses_sequence_parallel,
    )
    key = "rollout.tensor_model_parallel_size"
    check_engine_layout(hf_config, cfg.rollout.tensor_model_parallel_size, key)
    most = max_processes or torch.cuda.device_count() or max(4, os.cpu_count() or 1)
    rule = f"is less than the {cfg.trainer.world_size} processes that the layout needs"
    require(cfg.trainer.world_size <= most, "--max-processes", most, rule)
