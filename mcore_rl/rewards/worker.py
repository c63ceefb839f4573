"""The program of one scoring process: `python -m mcore_rl.rewards.worker <file descriptor>`.

It takes pickled calls from its connection one after another and answers each with a line of JSON,
until the other end closes. Whatever the function raises is an answer; what ends the process is
seen by the parent. It is a session of its own, so that killing its group also ends whatever the
function started, and it dies with the thread that started it. It imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import math
import numbers
import os
import pickle
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from mcore_rl.errors import UserError
from mcore_rl.rewards.base import CustomRewardConfig, RewardFunction, Score
from mcore_rl.rewards.child_process import die_with_parent, limit_memory
from mcore_rl.rewards.custom import load_custom_reward


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """The first message: what every call needs."""

    custom: CustomRewardConfig
    memory_gib: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCall:
    """One response to score."""

    function: Callable[..., Score | Awaitable[Score]] | None
    """Pickled by its name, and imported on arrival; None for the custom function."""
    arguments: Mapping[str, Any]


def main() -> None:
    """Serve the connection whose file descriptor is the argument."""
    die_with_parent(os.getppid())
    connection = Connection(int(sys.argv[1]))
    setup: WorkerSetup = pickle.loads(connection.recv_bytes())
    if setup.memory_gib is not None:
        limit_memory(int(setup.memory_gib * 2**30))
    try:
        custom = load_custom_reward(setup.custom)
    except UserError as error:
        _send(connection, {"refused": str(error)})
        return
    # The other end closes when the run ends, which may be while a call is being answered.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _send(connection, {})
        while True:
            _send(connection, _answer(connection.recv_bytes(), custom))


def _send(connection: Connection, message: Mapping[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _answer(message: bytes, custom: RewardFunction | None) -> dict[str, Any]:
    try:
        call: RewardCall = pickle.loads(message)
        function = call.function or custom
        assert function is not None
        result = function(**call.arguments)
        if inspect.isawaitable(result):
            result = asyncio.run(_result_of(result))
        score, others = read_result(result)
    # The function is the user's: whatever it raises, sys.exit too, is for the parent to judge.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    return {"score": score, "others": others}


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def read_result(result: object) -> tuple[float, dict[str, float]]:
    """Return the score and the other numbers of what a reward function returned.

    Raises:
        TypeError: if the score is missing or not a number.
        ValueError: if it is NaN or infinite.
    """
    others = dict(result) if isinstance(result, Mapping) else {"score": result}
    if "score" not in others:
        raise TypeError(f"it returned a mapping without 'score': {sorted(map(str, others))}")
    score = others.pop("score")
    if not isinstance(score, numbers.Real):
        raise TypeError(f"it returned {score!r}, not a number")
    if not math.isfinite(score):
        raise ValueError(f"it returned {score!r}, not a finite number")
    logged = {str(k): float(v) for k, v in others.items() if isinstance(v, numbers.Real)}
    return float(score), logged


if __name__ == "__main__":
    main()
