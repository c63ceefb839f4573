"""Errors, importable from everywhere; all of them pickle, since they cross processes.

Two kinds. A `UserError` is something the person at the command line can fix: it is shown as one
line without a traceback and ends the program with exit code 2. A `RunError` is a fault of the
running system: it names rank, role and step, keeps its traceback and ends the run at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from mcore_rl.printable import printable

RUN_ERROR_EXIT_CODE = 1
USER_ERROR_EXIT_CODE = 2
HANG_EXIT_CODE = 3


class UserError(ValueError):
    """Something the user asked for that cannot be done: one line, exit code 2."""

    def __str__(self) -> str:
        return printable(super().__str__())


class RunError(RuntimeError):
    """A fault while running.

    Args:
        message: what happened.
        rank: global rank it happened on; None for the controller alone.
        role: "controller", "actor", "rollout", ...
        step: step of the loop; None before the first one.
    """

    exit_code = RUN_ERROR_EXIT_CODE
    """Exit code of the command that it ends."""

    def __init__(
        self, message: str, *, rank: int | None = None, role: str = "", step: int | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.rank, self.role, self.step = message, rank, role, step

    def __str__(self) -> str:
        where = [f"role {self.role}"] if self.role else []
        where += [f"rank {self.rank}"] if self.rank is not None else []
        where += [f"step {self.step}"] if self.step is not None else []
        message = f"[{', '.join(where)}] {self.message}" if where else self.message
        return printable(message)

    def __reduce__(self):
        return _rebuild_run_error, (type(self), self.message, self.rank, self.role, self.step)


def _rebuild_run_error(cls, message, rank, role, step):
    return cls(message, rank=rank, role=role, step=step)


class StoppedError(Exception):
    """The run was asked to end, so the current work was aborted: `loop/stop.py`. Not a failure."""


class WorkerLostError(RunError):
    """A worker process ended, or cannot be reached any more."""


class EngineLostError(WorkerLostError):
    """An engine that is a process of its own ended, or hangs; it may be started again."""


class HangError(RunError):
    """There was no progress for as long as the run allows."""

    exit_code = HANG_EXIT_CODE


class RolloutError(RunError):
    """The rollout engine failed or returned something that cannot be right."""


class WeightSyncError(RunError):
    """Weights could not be sent to the engine, or the engine has other weights than the trainer."""


class OffloadError(RunError):
    """A part of a model is not on the expected device, or cannot be moved."""


class CheckpointError(RunError):
    """A checkpoint could not be written or read back."""


def user_error(key: str, value: object, rule: str, fix: str = "") -> UserError:
    """Return the UserError `key=value rule. fix`."""
    return UserError(f"{key}={value!r} {rule}." + (f" {fix}" if fix else ""))


def require(condition: bool, key: str, value: object, rule: str, fix: str = "") -> None:
    """Raise a UserError `key=value rule. fix` unless `condition` holds.

    Example: require(lr > 0, "actor.optim.lr", lr, "must be > 0", "Try 1e-6.")
    """
    if not condition:
        raise user_error(key, value, rule, fix)


def require_one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raise a UserError that names the closest allowed value unless `value` is allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(
            f"{key}={value!r} is not one of {', '.join(map(str, allowed))}."
            + closest_hint(str(value), map(str, allowed))
        )


def refuse_unread(cfg: Any, section: str, names: Iterable[str], choice: str) -> None:
    """Raise a UserError if an option that `choice` does not read was set.

    Args:
        cfg: config dataclass instance.
        section: its key: "algorithm".
        names: its fields that are not read; each must have a plain default.
        choice: the choice that does not read them: "adv_estimator=grpo".
    """
    defaults = {field.name: field.default for field in fields(cfg)}
    for name in names:
        value = getattr(cfg, name)
        fix = f"Leave it at {defaults[name]!r}."
        rule = f"is not read with {section}.{choice}"
        require(value == defaults[name], f"{section}.{name}", value, rule, fix)


def closest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that is most like `name`, or None when nothing is close."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return near[0] if near else None


def closest_hint(name: str, candidates: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest candidate, or "" when nothing is close."""
    near = closest(name, candidates)
    return f" Did you mean {near!r}?" if near is not None else ""
