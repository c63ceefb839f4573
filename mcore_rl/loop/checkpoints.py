"""Checkpoints of a run: written under another name and renamed, found again, resumed.

    <run folder>/checkpoints/global_step_20/actor/          Megatron's distributed checkpoint
                                           /critic/         the same, where there is one
                                           /controller.json step, place in the data, KL coefficient,
                                                            and the size of every file
                            /latest_checkpointed_iteration.txt

A folder appears under its name only when all ranks have written their parts and all of it is on the
disk. The pointer moves after that, so after a crash of the run or of the machine the previous
checkpoint is still valid. With `trainer.async_save` the ranks write copies while training goes on,
one checkpoint at a time. It becomes valid at the beginning of a later step, or when the next
checkpoint or the end of the run waits for it.

`global_step_20` is the state that step 20 begins with. The version of the weights is the step.
Nothing is in flight between two steps: no samples are kept. A step derives what it draws (prompts,
samples) from seed and step, so a resumed run computes the same as an uninterrupted one, bit by bit.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.config.run import TrainerConfig
from mcore_rl.durable_files import rename_whole, sync, write_whole
from mcore_rl.errors import CheckpointError, UserError, closest_hint
from mcore_rl.foreign_json import parse_json
from mcore_rl.observability.jsonl import read_metrics
from mcore_rl.observability.run_folder import METRICS_FILE

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
POINTER = "latest_checkpointed_iteration.txt"
CONTROLLER_FILE = "controller.json"
_KEPT_SINCE_LATER = ("ledger",)
"""Parts that the oldest checkpoints do not have; from such a checkpoint they start empty."""


class Stateful(Protocol):
    """Part of the controller that a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class _Begun:
    """A checkpoint that the ranks are writing."""

    step: int
    state: dict[str, Any]
    """State of the controller when the save began."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        trainer: how they are written, kept and resumed.
        run_dir: the run folder.
        cluster: running workers, whose actor is saved and loaded.
        parts: further objects to save and restore, by name.
    """

    def __init__(
        self,
        trainer: TrainerConfig,
        run_dir: Path,
        cluster: Cluster,
        parts: Mapping[str, Stateful],
    ) -> None:
        self._trainer, self._cluster, self._parts = trainer, cluster, parts
        self._metrics = run_dir / METRICS_FILE
        self._folder = run_dir / CHECKPOINTS
        self._begun: _Begun | None = None
        self._latest = 0
        """Step of the last checkpoint, or of the model that the run began with."""
        self._at_begin: _Begun | None = None
        """State that a checkpoint of the current step would hold, until its updates begin."""
        self._has_best_metric = False
        """Whether a step has logged trainer.best_ckpt_metric."""

    def resume(self) -> int:
        """Load the checkpoint to resume from, if there is one, and return the step to resume with.

        Raises:
            CheckpointError: if it is not there, not whole, or of another model.
        """
        step, folder = self.load(), self._to_resume()
        if folder is not None and folder.parent.resolve() == self._folder.resolve():
            # After going back, this checkpoint is the latest: later steps are done again.
            write_whole(self._folder / POINTER, str(step))
        return step

    def load(self) -> int:
        """Load as `resume` does, but leave the run's files as they are."""
        folder = self._to_resume()
        if folder is None:
            return 0
        if problem := _problem(folder):
            raise CheckpointError(
                f"{folder} is not whole: {problem}. {self._how_to_recover(folder)}",
                role="controller",
            )
        state = parse_json((folder / CONTROLLER_FILE).read_bytes())
        for name in self._parts:
            if name not in (*state, *_KEPT_SINCE_LATER):
                raise CheckpointError(
                    f"{folder} is of another kind of run: {CONTROLLER_FILE} has no {name!r}",
                    role="controller",
                )
        self._cluster.trainer.load(str(folder))
        for name, part in self._parts.items():
            if name in state:
                part.load_state_dict(state[name])
        logger.info("resumed from %s", folder)
        self._latest = int(state["step"])
        return self._latest

    def save(self, step: int) -> None:
        """Begin a checkpoint with `step` as the next step; complete it too unless `async_save`.

        Raises:
            CheckpointError: if it cannot be written; the previous one stays valid.
        """
        self._begin(self._state_at(step))
        if not self._trainer.async_save:
            self.finish()

    def save_begun(self) -> None:
        """Save the state that the current step began with, if its updates have not begun and there
        is no such checkpoint yet; wait until it is written.

        Raises:
            CheckpointError: as `save`.
        """
        if self._at_begin is not None and self._at_begin.step != self._latest:
            self._begin(self._at_begin)
        self.finish()

    def _state_at(self, step: int) -> _Begun:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        return _Begun(step, {"step": step, **parts})

    def _begin(self, begun: _Begun) -> None:
        self.finish()
        step, partial = begun.step, self._partial(begun.step)
        with self._failing_at(step):
            for leftover in (partial, self._final(step)):  # of a crash; the pointer names neither
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            sync(self._folder.parent)
            self._cluster.trainer.begin_save(str(partial))
        self._begun, self._latest = begun, step

    def begin_step(self, step: int) -> None:
        """Take note of the state that the step begins with. If every rank has written its part of
        the begun checkpoint, complete it.

        Raises:
            CheckpointError: if one of them cannot.
            UserError: if the logged metrics show that trainer.best_ckpt_metric is never measured.
        """
        self._at_begin = self._state_at(step)
        self._end(wait=False)
        self._look_for_best_metric()

    def begin_updates(self) -> None:
        """Take note that the weights are no longer those that the step began with."""
        self._at_begin = None

    def _look_for_best_metric(self) -> None:
        """Refuse a misspelt metric after the first step, or validation, that should have it.

        Metrics of a reward are not refused: not every sample needs to have them.
        """
        metric = self._trainer.best_ckpt_metric
        if metric is None or self._has_best_metric:
            return
        if metric.startswith(("reward/", "eval/")) and metric.endswith("/mean"):
            return
        # While the critic alone trains, the actor has no metrics.
        begun = self._trainer.critic_warmup
        lines = [line for line in read_metrics(self._metrics) if line["step"] >= begun]
        self._has_best_metric = any(metric in line for line in lines)
        if lines and not self._has_best_metric:
            _refuse_unknown_metric(metric, lines)

    def finish(self) -> None:
        """Wait for the checkpoint that was begun, if any, and complete it.

        Raises:
            CheckpointError: if it cannot be written.
        """
        self._end(wait=True)

    def _end(self, *, wait: bool) -> None:
        if self._begun is None or not self._cluster.trainer.end_save(wait=wait):
            return
        step, partial = self._begun.step, self._partial(self._begun.step)
        with self._failing_at(step):
            state = {**self._begun.state, "files": _sizes(partial)}
            write_whole(partial / CONTROLLER_FILE, json.dumps(state))
            rename_whole(partial, self._final(step))
            write_whole(self._folder / POINTER, str(step))
            self._begun = None
            self._drop_others(step)

    @contextmanager
    def _failing_at(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self._final(step)} cannot be written: {error}", role="controller", step=step
            ) from error

    def _final(self, step: int) -> Path:
        return self._folder / f"global_step_{step}"

    def _partial(self, step: int) -> Path:
        return self._folder / f"global_step_{step}.partial"

    def _steps(self) -> list[int]:
        """Return the steps of all checkpoints that have their names, in order."""
        names = [folder.name for folder in self._folder.glob("global_step_*")]
        numbers = [name.removeprefix("global_step_") for name in names]
        return sorted(int(number) for number in numbers if number.isdecimal())

    def _to_resume(self) -> Path | None:
        try:
            return checkpoint_to_resume(self._trainer, self._folder.parent)
        except ValueError as error:
            raise CheckpointError(
                f"{self._folder / POINTER} names no step: {error}. "
                f"{self._how_to_recover(self._folder)}",
                role="controller",
            ) from error

    def _how_to_recover(self, bad: Path) -> str:
        """Say from which checkpoint a run can resume when the checkpoint `bad` cannot be used."""
        others = [self._final(step) for step in reversed(self._steps())]
        whole = (other for other in others if other != bad and not _problem(other))
        if (found := next(whole, None)) is None:
            return "No other checkpoint of the run is whole: begin a run of another name."
        return (
            f"{found.name} is whole: go on from it with trainer.resume_mode=resume_path "
            f"trainer.resume_from_path={found}"
        )

    def _drop_others(self, step: int) -> None:
        """Remove all but the last and the best of the checkpoints up to `step`."""
        if self._trainer.max_ckpt_to_keep is None:
            return
        # Checkpoints of later steps are left from before the run went back to an earlier one.
        steps = [number for number in self._steps() if number <= step]
        if older := steps[: -self._trainer.max_ckpt_to_keep]:
            best = self._best_of(steps)
            for number in older:
                if number != best:
                    shutil.rmtree(self._final(number))

    def _best_of(self, steps: list[int]) -> int | None:
        """Return the step of the best checkpoint so far, the later one of equals.

        The line of step s in metrics.jsonl describes the weights of `global_step_s`. The latest
        checkpoint has no line yet.
        """
        metric = self._trainer.best_ckpt_metric
        if metric is None:
            return None
        lines = read_metrics(self._metrics)
        if not any(metric in line for line in lines):
            _refuse_unknown_metric(metric, lines)
        sign = 1 if self._trainer.best_ckpt_mode == "max" else -1
        values = [
            (sign * line[metric], line["step"])
            for line in lines
            if line["step"] in steps and math.isfinite(line.get(metric, math.nan))
        ]
        return max(values)[1] if values else None


def checkpoint_to_resume(trainer: TrainerConfig, run_dir: Path) -> Path | None:
    """Return the folder of the checkpoint that a run resumes from; None: it starts new.

    Raises:
        ValueError: if the pointer to the latest one is damaged.
    """
    own = run_dir / CHECKPOINTS
    pointer = own / POINTER
    if trainer.resume_from_path is not None:
        folder = Path(trainer.resume_from_path)
        is_own = folder.parent.resolve() == own.resolve()
        # Another run's checkpoint is where this run began; it may have come further since.
        if is_own or not pointer.exists():
            return folder
    return own / f"global_step_{int(pointer.read_text())}" if pointer.exists() else None


def _refuse_unknown_metric(metric: str, lines: list[dict[str, Any]]) -> None:
    """Raise a UserError if the lines should have the metric. Validation metrics may come later."""
    keys = {key for line in lines for key in line}
    if not metric.startswith("eval/") or any(key.startswith("eval/") for key in keys):
        raise UserError(
            f"trainer.best_ckpt_metric={metric!r} is not among the metrics of the run."
            f"{closest_hint(metric, sorted(keys))} All of them are in {METRICS_FILE}."
        )


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below `folder`, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _problem(folder: Path) -> str:
    """Return what is missing in a checkpoint; "" if it is complete."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        sizes = dict(parse_json((folder / CONTROLLER_FILE).read_bytes())["files"])
    except FileNotFoundError:
        return f"{CONTROLLER_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{CONTROLLER_FILE} cannot be read ({error})"
    found = _sizes(folder)
    for name, size in sizes.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes and was written with {size}"
    return ""
