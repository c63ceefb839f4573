"""The run folder: made for a new run, or opened to continue the run that it holds.

A resumed run may change where and how long it runs, not what it computes.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mcore_rl.config.compose import to_yaml
from mcore_rl.durable_files import make_private, write_whole
from mcore_rl.errors import UserError, require, user_error
from mcore_rl.foreign_json import parse_json
from mcore_rl.hub import is_same_repository
from mcore_rl.loop.checkpoints import (
    CHECKPOINTS,
    CONTROLLER_FILE,
    POINTER,
    checkpoint_to_resume,
)
from mcore_rl.megatron import overrides
from mcore_rl.observability.run_folder import CONFIG_FILE, METRICS_FILE, read_config

logger = logging.getLogger(__name__)

_LOCK_FILE = "run.lock"
_HOLD_WAIT_S = 100
"""Longer than the 90 s for which a file server commonly keeps the locks of a dead machine."""

_STAYS = (
    "actor.megatron.dtype",
    "actor.megatron.moe_router_freeze",
    "actor.megatron.use_distributed_optimizer",
    "trainer.loop",
    "trainer.max_staleness",
)
"""What a checkpoint holds depends on these, so they stay also below a section that may change."""
_ROUTER_LOSSES = tuple(f"{overrides.KEY}.{field}" for field in overrides.ROUTER_LOSSES)
_MAY_CHANGE = (
    "trainer.",
    "actor.megatron.",
    "actor.optim.lr_decay_steps",
    "critic.optim.lr_decay_steps",
    "actor.ppo_micro_batch_size_per_gpu",
    "actor.ppo_max_token_len_per_gpu",
    "actor.use_dynamic_bsz",
    "data.val_",
    "rollout.val_kwargs.",
    "rollout.max_num_seqs",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_memory_bytes",
    "rollout.engine_kwargs",
    "rollout.weight_transport",
    "rollout.update_weights_bucket_mib",
)


def open_run_folder(cfg: Any, total_steps: int) -> Path:
    """Make the run folder, write the resolved configuration into it and return it.

    The folder is this process's until it ends.

    Args:
        cfg: the run.
        total_steps: of it.

    Raises:
        UserError: if the folder holds a run that this configuration does not continue or that
            another process goes on with, or if trainer.resume_from_path is no checkpoint or one
            from which this configuration cannot go on.
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
        make_private(folder)
    except OSError as error:
        rule = f"cannot be made a folder ({error.strerror})"
        key = "trainer.default_local_dir"
        raise user_error(key, str(folder), rule, "Name another.") from error
    lock = _hold(folder)
    written = to_yaml(cfg)
    if config_file.exists() and _has_begun(folder):
        fix = "Set trainer.experiment_name to a new name, or remove the folder."
        if cfg.trainer.resume_mode == "disable":
            raise UserError(f"{folder} holds a run and trainer.resume_mode=disable. {fix}")
        old, new = _flat(read_config(config_file)), _flat(OmegaConf.create(written))
        _refuse_another_run(old, new, folder, f"{fix}{_how_to_continue(folder)}")
        _refuse_another_schedule(old, new, config_file, total_steps)
    _check_checkpoint(cfg, folder, total_steps, written)
    write_whole(config_file, written)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return folder


def _hold(folder: Path) -> int:
    """Keep other processes from opening the folder until this one ends, however it ends; return the
    descriptor of the file that says who holds it.

    A process that was just killed gets time to end; over a network its lock may stay after a
    machine failed, as long as the file server allows.
    """
    # A lock of POSIX: not shared by what this process forks, and known to network file systems.
    file = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT)
    waited_s = 0
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except (BlockingIOError, PermissionError) as error:  # which of them: as the system likes
            holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            if waited_s == _HOLD_WAIT_S:
                raise UserError(
                    f"{folder} is being written by {holder}. Wait for its end, or set "
                    "trainer.experiment_name to a new name."
                ) from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no other run in it", folder, error)
            return file
        if waited_s == 0:
            logger.warning("%s is being written by %s: waiting for its end", folder, holder)
        time.sleep(1)
        waited_s += 1


def _has_begun(folder: Path) -> bool:
    """Whether a run logged or saved a step here; a run that failed before that may be corrected."""
    metrics = folder / METRICS_FILE
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or (folder / CHECKPOINTS / POINTER).exists()


def _how_to_continue(folder: Path) -> str:
    """Say how a new run can start from the weights of the run in the folder; "" if it saved
    none."""
    pointer = folder / CHECKPOINTS / POINTER
    if not pointer.exists():
        return ""
    latest = folder / CHECKPOINTS / f"global_step_{pointer.read_text().strip()}"
    return (
        " A run of another name begins with the weights of this one by "
        f"trainer.resume_mode=resume_path trainer.resume_from_path={latest}"
    )


def _check_checkpoint(cfg: Any, folder: Path, total_steps: int, written: str) -> None:
    """Raise a UserError if the run, `written` as YAML, cannot go on from the checkpoint that it
    names or has.

    One that is damaged is named when it is loaded.
    """
    try:
        checkpoint = checkpoint_to_resume(cfg.trainer, folder)
        if checkpoint is None:
            return
        step = int(parse_json((checkpoint / CONTROLLER_FILE).read_text())["step"])
    except (OSError, ValueError, KeyError):
        return
    is_own = checkpoint.parent.resolve() == (folder / CHECKPOINTS).resolve()
    if not cfg.trainer.val_only and (step > total_steps or (step == total_steps and not is_own)):
        raise UserError(
            f"{checkpoint} is of step {step}, and the run has {total_steps} steps: nothing is left "
            "to train. Raise trainer.total_training_steps or trainer.total_epochs."
        )
    other_config = checkpoint.parent.parent / CONFIG_FILE
    if not is_own and other_config.exists():
        old, new = _flat(read_config(other_config)), _flat(OmegaConf.create(written))
        for key in _STAYS:
            rule = f"differs from {old.get(key)!r} of the run that wrote {checkpoint}"
            require(
                new.get(key) == old.get(key, new.get(key)), key, new.get(key), rule, "Set that."
            )
        _refuse_another_schedule(old, new, other_config, total_steps)


def _refuse_another_run(old: dict[str, Any], new: dict[str, Any], folder: Path, fix: str) -> None:
    for key in sorted(old.keys() | new.keys()):
        may_change = key.startswith(_MAY_CHANGE) and key not in (*_STAYS, *_ROUTER_LOSSES)
        if old.get(key) != new.get(key) and not may_change:
            if key.endswith("model.path") and is_same_repository(old.get(key), new.get(key)):
                fix = f"Go on with the commit that it began with: {key}={old[key]}"
            raise UserError(
                f"{key}={new.get(key)!r} differs from {old.get(key)!r} of the run in "
                f"{folder}, which this command would continue. {fix}"
            )


def _refuse_another_schedule(
    old: dict[str, Any], new: dict[str, Any], config_file: Path, total_steps: int
) -> None:
    """Raise a UserError if the run has another length than before and with it, unsaid, another
    learning rate in the coming step."""
    lengths = ("trainer.total_training_steps", "trainer.total_epochs")
    changed = [key for key in lengths if old.get(key) != new.get(key)]
    if new.get(lengths[0]) is not None and lengths[0] not in changed:
        return  # it decides
    for section in ("actor.optim", "critic.optim"):
        key, style = f"{section}.lr_decay_steps", new.get(f"{section}.lr_decay_style", "constant")
        if changed and style != "constant" and new.get(key) is None:
            was = old.get(changed[0])
            raise UserError(
                f"{key}=None makes the {style} schedule as long as the run, and {changed[0]} was "
                f"{was!r} in {config_file.parent}: the learning rate would jump. Set {key} to the "
                f"steps that it had there, or to {total_steps} for those of this run."
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
