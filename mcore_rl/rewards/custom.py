"""A user's reward function, loaded from a Python file."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from mcore_rl.errors import UserError, closest_hint, require
from mcore_rl.rewards.base import CustomRewardConfig, RewardFunction

_MODULE_NAME = "mcore_rl_custom_reward"


def load_custom_reward(cfg: CustomRewardConfig) -> RewardFunction | None:
    """Return the function that the section names, or None if it names no file.

    `reward_kwargs` are already bound.

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
        "Mend the path.",
    )
    module = _import_file(path)
    if not hasattr(module, cfg.name):
        functions = [name for name, _ in inspect.getmembers(module, inspect.isfunction)]
        raise UserError(
            f"custom_reward_function.name={cfg.name!r} is not defined in {path}."
            f"{closest_hint(cfg.name, functions)} Functions: {', '.join(functions) or 'none'}."
        )
    function = getattr(module, cfg.name)
    _check_signature(function, cfg, path)
    return functools.partial(function, **cfg.reward_kwargs)


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
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"custom_reward_function.path={str(path)!r} fails to import ({reason}). Mend the file."
        ) from error
    return module


def _check_signature(function: object, cfg: CustomRewardConfig, path: Path) -> None:
    expected = "def compute_score(data_source, solution_str, ground_truth, extra_info=None)"
    require(
        callable(function),
        "custom_reward_function.name",
        cfg.name,
        f"is not a function in {path}",
        f"Define it as `{expected}`.",
    )
    assert callable(function)
    given: Mapping[str, Any] = dict.fromkeys(
        ("data_source", "solution_str", "ground_truth", "extra_info")
    )
    taken = sorted(given.keys() & cfg.reward_kwargs.keys())
    require(
        not taken,
        "custom_reward_function.reward_kwargs",
        taken,
        "are arguments that the data gives",
        "Leave them out.",
    )
    try:
        inspect.signature(function).bind(**given, **cfg.reward_kwargs)
    except TypeError as error:
        raise UserError(
            f"custom_reward_function.name={cfg.name!r} in {path} does not take the arguments of a "
            f"reward and custom_reward_function.reward_kwargs={cfg.reward_kwargs!r} ({error}). "
            f"Define it as `{expected}`, with a parameter for each of the further ones."
        ) from None
