"""Checkpoints of a run: written beside and renamed, found again, continued.

    <run folder>/checkpoints/global_step_20/actor/          Megatron's distributed checkpoint
                                           /controller.json step, place in the data, KL coefficient
                            /latest_checkpointed_iteration.txt

A folder appears under its name only when it is complete, and the pointer moves after that, so a
crash at any moment leaves the previous checkpoint in force.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from mcore_rl.config.compose import to_yaml
from mcore_rl.errors import CheckpointError, UserError
from mcore_rl.launch.cluster import Cluster
from mcore_rl.observability.run_folder import CONFIG_FILE, METRICS_FILE

logger = logging.getLogger(__name__)

POINTER = "latest_checkpointed_iteration.txt"

# A resumed run may change where and how long it runs, not what it computes.
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


class Stateful(Protocol):
    """Part of the controller that a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


def open_run_folder(cfg: Any, *, may_resume: bool) -> Path:
    """Make the run folder, write the resolved configuration into it and return it.

    Raises:
        UserError: if the folder holds a run that this configuration does not continue.
    """
    folder = Path(cfg.trainer.default_local_dir)
    config_file = folder / CONFIG_FILE
    if config_file.exists() and _has_begun(folder):
        fix = "Set trainer.experiment_name to a new name, or remove the folder."
        if not may_resume:
            raise UserError(f"{folder} holds a run and trainer.resume_mode=disable. {fix}")
        _refuse_another_run(config_file, to_yaml(cfg), fix)
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(config_file, to_yaml(cfg))
    return folder


def _has_begun(folder: Path) -> bool:
    """Whether a run logged or saved a step here; one that failed before may be mended."""
    metrics = folder / METRICS_FILE
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or (folder / "checkpoints" / POINTER).exists()


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


def resume(run_dir: Path, cluster: Cluster, parts: Mapping[str, Stateful]) -> int:
    """Load the latest checkpoint of the run, if any, and return the step to go on with.

    Args:
        run_dir: the run folder.
        cluster: running workers, whose actor is loaded.
        parts: what else is restored, by name.

    Raises:
        CheckpointError: if the pointer names a checkpoint that is not there or not whole.
    """
    checkpoints = run_dir / "checkpoints"
    pointer = checkpoints / POINTER
    if not pointer.exists():
        return 0
    folder = checkpoints / f"global_step_{int(pointer.read_text())}"
    try:
        state = json.loads((folder / "controller.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}", role="controller") from error
    cluster.load(str(folder / "actor"))
    for name, part in parts.items():
        part.load_state_dict(state[name])
    logger.info("resumed from %s", folder)
    return int(state["step"])


def save(
    run_dir: Path,
    step: int,
    cluster: Cluster,
    parts: Mapping[str, Stateful],
    max_to_keep: int | None,
) -> None:
    """Write a checkpoint from which `step` is the next step, and drop those beyond `max_to_keep`.

    Raises:
        CheckpointError: if it cannot be written; the previous one stays in force.
    """
    checkpoints = run_dir / "checkpoints"
    final = checkpoints / f"global_step_{step}"
    partial = final.with_suffix(".partial")
    try:
        for leftover in (partial, final):  # of a crash; the pointer does not name them
            shutil.rmtree(leftover, ignore_errors=True)
        (partial / "actor").mkdir(parents=True)
        cluster.save(str(partial / "actor"))
        state = {"step": step, **{name: part.state_dict() for name, part in parts.items()}}
        _write_whole(partial / "controller.json", json.dumps(state))
        partial.rename(final)
        _write_whole(checkpoints / POINTER, str(step))
    except OSError as error:
        raise CheckpointError(
            f"{final} cannot be written: {error}", role="controller", step=step
        ) from error
    if max_to_keep is not None:
        _drop_older(checkpoints, step, max_to_keep)


def _drop_older(checkpoints: Path, step: int, max_to_keep: int) -> None:
    steps = sorted(int(path.name.split("_")[-1]) for path in checkpoints.glob("global_step_*[0-9]"))
    for old in [number for number in steps if number <= step][:-max_to_keep]:
        shutil.rmtree(checkpoints / f"global_step_{old}")


def _write_whole(file: Path, text: str) -> None:
    """Write a file so that a crash leaves either the old or the new content."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
