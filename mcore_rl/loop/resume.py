"""The run folder: made for a new run, or opened to continue the run that it holds.

A resumed run may change where and how long it runs, not what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mcore_rl.config.compose import to_yaml
from mcore_rl.durable_files import write_whole
from mcore_rl.errors import UserError, require
from mcore_rl.loop.checkpoints import CHECKPOINTS, CONTROLLER_FILE, POINTER
from mcore_rl.observability.run_folder import CONFIG_FILE, METRICS_FILE

_MAY_CHANGE = (
    "trainer.",
    "actor.megatron.",
    "actor.ppo_micro_batch_size_per_gpu",
    "actor.ppo_max_token_len_per_gpu",
    "actor.use_dynamic_bsz",
    "data.val_",
    "rollout.val_kwargs.",
    "rollout.max_num_seqs",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_memory_bytes",
    "rollout.engine_kwargs",
)


def open_run_folder(cfg: Any) -> Path:
    """Make the run folder, write the resolved configuration into it and return it.

    Raises:
        UserError: if the folder holds a run that this configuration does not continue, or
            trainer.resume_from_path is no checkpoint.
    """
    folder = Path(cfg.trainer.default_local_dir)
    config_file = folder / CONFIG_FILE
    if cfg.trainer.resume_from_path is not None:
        require(
            (Path(cfg.trainer.resume_from_path) / CONTROLLER_FILE).is_file(),
            "trainer.resume_from_path",
            cfg.trainer.resume_from_path,
            f"has no {CONTROLLER_FILE}",
            "Name a folder global_step_<n> in the checkpoints of a run.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be made a folder ({error.strerror})"
        require(False, "trainer.default_local_dir", str(folder), rule, "Name another.")
    if config_file.exists() and _has_begun(folder):
        fix = "Set trainer.experiment_name to a new name, or remove the folder."
        if cfg.trainer.resume_mode == "disable":
            raise UserError(f"{folder} holds a run and trainer.resume_mode=disable. {fix}")
        _refuse_another_run(config_file, to_yaml(cfg), fix)
    write_whole(config_file, to_yaml(cfg))
    return folder


def _has_begun(folder: Path) -> bool:
    """Whether a run logged or saved a step here; one that failed before may be mended."""
    metrics = folder / METRICS_FILE
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or (folder / CHECKPOINTS / POINTER).exists()


def _refuse_another_run(config_file: Path, new_yaml: str, fix: str) -> None:
    old, new = _flat(OmegaConf.load(config_file)), _flat(OmegaConf.create(new_yaml))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(_MAY_CHANGE):
            raise UserError(
                f"{key}={new.get(key)!r} differs from {old.get(key)!r} of the run in "
                f"{config_file.parent}, which this command would continue. {fix}"
            )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    plain = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    if not isinstance(plain, Mapping):
        return {prefix: plain}
    return {
        key: value
        for name, child in plain.items()
        for key, value in _flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }
