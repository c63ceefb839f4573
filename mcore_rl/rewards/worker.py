"""The program of one scoring process: `python -m mcore_rl.rewards.worker <file descriptor>`.

It takes pickled jobs from its connection and answers each with a line of JSON, until the other end
closes. Whatever the function raises is an answer; what ends the process is seen by the parent. It
is a session of its own, so that killing its group also ends whatever the function started, and it
dies with the thread that started it. It imports no torch.

Plain functions run one after another, in the main thread and with no event loop running, so they
may set alarms and call `asyncio.run`. `async` ones run side by side on one event loop, which is the
process's for its life: clients and sessions that a function keeps go on working in later calls. The
parent assigns the jobs and never gives a process both kinds at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import decimal
import inspect
import json
import math
import numbers
import pickle
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from mcore_rl.errors import UserError
from mcore_rl.processes import die_with_parent
from mcore_rl.rewards.base import ANSWER, BUILT_IN_NUMBERS, CustomRewardConfig
from mcore_rl.rewards.custom import CustomReward, is_async, load_custom_reward
from mcore_rl.rewards.limits import limit_memory

_LONGEST_REASON = 2000
"""Most characters of a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """The first message: what every call needs."""

    custom: CustomRewardConfig
    memory_gib: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardCall:
    """One response to score."""

    function: Callable[..., Any] | None
    """Pickled by its name, and imported on arrival; None for the custom function."""
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The responses scored by one call of a function."""

    number: int
    """Number that comes back with the answer."""
    calls: Sequence[RewardCall]
    """One call, or all calls of a batch function."""
    is_batch: bool
    """Whether the function gets all of them at once."""
    limit_s: float | None
    """Longest time for the job; for a plain function the parent enforces it."""


Answer = dict[str, Any]
"""The answer for one response: "score", "answer" and "others", or "error" and "timed_out"."""


def main() -> None:
    """Serve the connection whose file descriptor is the first argument; the second is the number of
    the process at its other end."""
    die_with_parent(int(sys.argv[2]))
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
    with (
        contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError),
        asyncio.Runner() as runner,
    ):
        kind = {"is_async": custom.is_async, "is_batch": custom.is_batch} if custom else {}
        _send(connection, kind)
        while True:
            job, function = _read(connection, custom)
            if is_async(function):
                runner.run(_Concurrent(connection, custom).serve(job, function))
            else:
                _send(connection, {"job": job.number, "answers": _answer(job, function, runner)})


def _send(connection: Connection, message: Mapping[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _read(connection: Connection, custom: CustomReward | None) -> tuple[Job, Callable[..., Any]]:
    job: Job = pickle.loads(connection.recv_bytes())
    function = job.calls[0].function
    if function is None:
        assert custom is not None
        function = custom.function
    return job, function


def _answer(job: Job, function: Callable[..., Any], runner: asyncio.Runner) -> list[Answer]:
    try:
        result = function(**_arguments(job))
        if inspect.isawaitable(result):
            result = runner.run(_result_of(result))
    # The function is the user's: whatever it raises, sys.exit too, is for the parent to judge.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return _failed(job, error)
    return _answers(job, result)


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


class _Concurrent:
    """Answers async jobs side by side, as long as there are any."""

    def __init__(self, connection: Connection, custom: CustomReward | None) -> None:
        self._connection, self._custom = connection, custom
        self._running: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Lock()
        self._is_closed = False

    async def serve(self, job: Job, function: Callable[..., Any]) -> None:
        """Answer this job and those that come meanwhile.

        Raises:
            EOFError: if the other end closes.
        """
        loop, descriptor = asyncio.get_running_loop(), self._connection.fileno()
        self._begin(job, function)
        loop.add_reader(descriptor, self._take)
        try:
            while self._running and not self._is_closed:
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_reader(descriptor)
        if self._is_closed:
            raise EOFError

    def _take(self) -> None:
        try:
            self._begin(*_read(self._connection, self._custom))
        except (EOFError, OSError):
            self._is_closed = True
            for task in self._running:
                task.cancel()

    def _begin(self, job: Job, function: Callable[..., Any]) -> None:
        task = asyncio.create_task(self._answer(job, function))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, job: Job, function: Callable[..., Any]) -> None:
        message = {"job": job.number, "answers": await _answer_async(job, function)}
        # In a thread: the other end may be sending, and this loop has to go on reading then.
        async with self._sending:
            with contextlib.suppress(OSError):  # closed; `_take` sees it too
                await asyncio.to_thread(_send, self._connection, message)


async def _answer_async(job: Job, function: Callable[..., Any]) -> list[Answer]:
    limit = asyncio.timeout(job.limit_s)
    try:
        async with limit:
            result = await function(**_arguments(job))
    except (Exception, SystemExit) as error:  # noqa: BLE001  as in `_answer`
        if isinstance(error, TimeoutError) and limit.expired():
            return [time_limit_exceeded(job.limit_s)] * len(job.calls)
        return _failed(job, error)
    return _answers(job, result)


def time_limit_exceeded(limit_s: float | None) -> Answer:
    """Return the answer of a call that took too long."""
    return {"error": f"TimeLimitExceeded: no result after {limit_s:g} s", "timed_out": True}


def _arguments(job: Job) -> dict[str, Any]:
    """Return the arguments of the call; for a batch, lists under the plurals of their names."""
    if not job.is_batch:
        return dict(job.calls[0].arguments)
    return {f"{name}s": [c.arguments[name] for c in job.calls] for name in job.calls[0].arguments}


def _failed(job: Job, error: BaseException) -> list[Answer]:
    return [_failure(error)] * len(job.calls)


def _failure(error: BaseException) -> Answer:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return {"error": reason[:_LONGEST_REASON]}


def _answers(job: Job, result: object) -> list[Answer]:
    """Return the answer of each response of the job."""
    if not job.is_batch:
        return [_answer_of(result)]
    try:
        if isinstance(result, str | bytes | Mapping):
            raise TypeError("a batch function returns a list, a score for each response")
        results = list(result)  # pyright: ignore[reportArgumentType]  anything that can be listed
        if len(results) != len(job.calls):
            raise ValueError(f"{len(results)} scores for {len(job.calls)} responses")
    except Exception as error:  # noqa: BLE001  as in `_answer`
        return _failed(job, error)
    return [_answer_of(one) for one in results]


def _answer_of(result: object) -> Answer:
    try:
        return read_result(result)
    except Exception as error:  # noqa: BLE001  a mapping of the user's own may raise anything
        return _failure(error)


def read_result(result: object) -> Answer:
    """Return score, answer and other numbers of a reward function's result; the others may be NaN
    or infinite.

    Raises:
        TypeError: if the score is missing or not a number.
        ValueError: if it is NaN or infinite, or if another number has the name of a metric.
    """
    others = dict(result) if isinstance(result, Mapping) else {"score": result}
    if "score" not in others:
        raise TypeError(f"it returned a mapping without 'score': {sorted(map(str, others))}")
    returned = others.pop("score")
    has_answer, stated = ANSWER in others, others.pop(ANSWER, None)
    score = _number(returned)
    if score is None:
        raise TypeError(f"it returned {returned!r}, not a number")
    if not math.isfinite(score):
        raise ValueError(f"it returned {returned!r}, not a finite number")
    logged = {str(k): number for k, v in others.items() if (number := _number(v)) is not None}
    if taken := sorted(logged.keys() & set(BUILT_IN_NUMBERS)):
        raise ValueError(f"it returned the number {taken[0]!r}, which names a metric of every run")
    answer = ("" if stated is None else str(stated)) if has_answer else None
    return {"score": score, "answer": answer, "others": logged}


def _number(value: Any) -> float | None:
    """Return a number, also one of numpy or torch (np.bool_, an array without dimensions), as a
    float; None for anything else."""
    if (
        not isinstance(value, numbers.Real | decimal.Decimal)
        and getattr(value, "shape", None) == ()
    ):
        value = value.item()
    return float(value) if isinstance(value, numbers.Real | decimal.Decimal) else None


if __name__ == "__main__":
    main()
