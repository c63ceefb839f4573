"""A user's reward function, loaded from a Python file, and what kind it is.

    def compute_score(data_source, solution_str, ground_truth, extra_info=None): ...
    def compute_score(data_sources, solution_strs, ground_truths, extra_infos=None): ...

The second is a batch function: it gets all responses at once, as lists, and returns a list. Either
may be `async`. The file can import its neighbours, as a program can import the files next to its
script.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mcore_rl.errors import UserError, closest_hint, require
from mcore_rl.rewards.base import CustomRewardConfig

_MODULE_NAME = "mcore_rl_custom_reward"
_OF_ONE = ("data_source", "solution_str", "ground_truth", "extra_info")
_OF_A_BATCH = tuple(f"{name}s" for name in _OF_ONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomReward:
    """A function that `custom_reward_function` names."""

    function: Callable[..., Any]
    """`reward_kwargs` are bound."""
    is_async: bool
    """Whether calls can be awaited side by side."""
    is_batch: bool
    """Whether it takes lists, of the arguments of several responses, and returns one."""


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call only makes a coroutine; also for an object with `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004  looked at, not whether it is there
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def load_custom_reward(cfg: CustomRewardConfig) -> CustomReward | None:
    """Return the function that the section names, or None if it names no file.

    Raises:
        UserError: if the file is missing or fails to import, or has no function of that name that
            takes the arguments of a reward and the further ones.
    """
    if cfg.path is None:
        return None
    path = Path(cfg.path).expanduser()
    require(
        os.path.isfile(path),
        "custom_reward_function.path",
        cfg.path,
        "does not exist",
        "Fix the path.",
    )
    module = _import_file(path)
    if not hasattr(module, cfg.name):
        functions = [name for name, _ in inspect.getmembers(module, inspect.isfunction)]
        raise UserError(
            f"custom_reward_function.name={cfg.name!r} is not defined in {path}."
            f"{closest_hint(cfg.name, functions)} Functions: {', '.join(functions) or 'none'}."
        )
    function = getattr(module, cfg.name)
    is_batch = _is_batch(function, cfg, path)
    bound = functools.partial(function, **cfg.reward_kwargs)
    return CustomReward(function=bound, is_async=is_async(bound), is_batch=is_batch)


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_MODULE_NAME, path)
    require(
        spec is not None,
        "custom_reward_function.path",
        str(path),
        "is not a Python file",
        "Its name must end in .py.",
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE_NAME] = module  # dataclasses and pickle look their module up by name
    sys.path.insert(0, str(path.resolve().parent))  # for good: functions import when called, too
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        fix = "Fix the file."
        if isinstance(error, ModuleNotFoundError):
            fix = "Install it, or put it beside the file."
        raise UserError(
            f"custom_reward_function.path={str(path)!r} fails to import ({reason}). {fix}"
        ) from error
    return module


def _is_batch(function: object, cfg: CustomRewardConfig, path: Path) -> bool:
    """Return whether it is a batch function, after a check of what it takes."""
    expected = f"def {cfg.name}({', '.join(_OF_ONE)}=None)"
    require(
        callable(function),
        "custom_reward_function.name",
        cfg.name,
        f"is not a function in {path}",
        f"Define it as `{expected}`.",
    )
    assert callable(function)
    signature = inspect.signature(function)
    is_batch = "solution_strs" in signature.parameters
    names = _OF_A_BATCH if is_batch else _OF_ONE
    taken = sorted(set(names) & cfg.reward_kwargs.keys())
    require(
        not taken,
        "custom_reward_function.reward_kwargs",
        taken,
        "are arguments that the data gives",
        "Leave them out.",
    )
    try:
        signature.bind(**dict.fromkeys(names), **cfg.reward_kwargs)
    except TypeError as error:
        raise UserError(
            f"custom_reward_function.name={cfg.name!r} in {path} does not take the arguments of a "
            f"reward and custom_reward_function.reward_kwargs={cfg.reward_kwargs!r} ({error}). "
            f"Define it as `{expected}`, with a parameter for each of the further ones; for all "
            f"responses at once as `def {cfg.name}({', '.join(_OF_A_BATCH)}=None)`."
        ) from None
    return is_batch
