"""Processes that score: several at a time, each killed when it takes too long.

Reward functions run in processes of their own, because nothing else stops a function that hangs in
a call into C, ends its process or eats the memory. Processes start when there is work, serve call
after call, and are replaced when they were killed or died; they hold no torch, so starting one
takes a fraction of a second.

Invariants: every call gets an outcome, or an error ends `run`; a process that did not answer in
time is dead, with all of its group, before its outcome is seen; no process outlives the pool or the
program.
"""

from __future__ import annotations

import collections
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mcore_rl.errors import RunError, UserError
from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
from mcore_rl.rewards.worker import RewardCall, WorkerSetup

_START_LIMIT_S = 300.0
"""Longest time for a process to start and import a custom function."""
_LOOK_S = 1.0
"""How often to look for processes that ended while something they started holds the connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one call."""

    score: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)
    """The further numbers that the function returned."""
    error: str | None = None
    """Why there is no score, on one line."""


class RewardPool:
    """Up to `reward.num_workers` processes; none before the first call.

    Args:
        cfg: the `reward` section.
        custom: the `custom_reward_function` section, loaded by each process.
    """

    def __init__(self, cfg: RewardConfig, custom: CustomRewardConfig) -> None:
        self._cfg = cfg
        self._setup = WorkerSetup(custom=custom, memory_gib=cfg.memory_gib)
        self._workers: list[_Worker] = []
        self._close = weakref.finalize(self, _kill_all, self._workers)

    def start(self) -> None:
        """Start one process and wait until it is ready, if none is there.

        Raises:
            UserError: if the custom function cannot be loaded.
            RunError: if the process ends or hangs before it is ready.
        """
        self._drop_dead()
        if not self._workers:
            self._workers.append(_Worker(self._setup))
        while not any(worker.is_ready for worker in self._workers):
            for _ in self._collect():
                pass

    def run(self, calls: Sequence[RewardCall]) -> Iterator[tuple[int, Outcome]]:
        """Yield the position and outcome of every call, in the order in which they end.

        A caller that stops early leaves no call running.

        Raises:
            UserError, RunError: as `start`.
        """
        waiting = collections.deque(enumerate(calls))
        num_left = len(calls)
        try:
            while num_left:
                self._dispatch(waiting)
                for outcome in self._collect():
                    num_left -= 1
                    yield outcome
        finally:
            for worker in self._workers:
                if worker.position is not None:
                    worker.kill()
            self._drop_dead()

    def close(self) -> None:
        """End all processes."""
        self._close()

    def _drop_dead(self) -> None:
        """Forget the dead who owe no answer; `_collect` hears of the others."""
        dead = [w for w in self._workers if not w.is_pending and not w.is_alive]
        for worker in dead:
            worker.kill()  # what it started may live on
        self._workers[:] = [worker for worker in self._workers if worker not in dead]

    def _dispatch(self, waiting: collections.deque[tuple[int, RewardCall]]) -> None:
        self._drop_dead()
        for worker in self._workers:
            if waiting and worker.is_ready and worker.position is None:
                position, call = waiting.popleft()
                if not worker.give(position, call, self._cfg.timeout_s):
                    waiting.appendleft((position, call))
        num_free = sum(worker.position is None for worker in self._workers)
        num_new = min(len(waiting) - num_free, self._cfg.max_workers - len(self._workers))
        self._workers += [_Worker(self._setup) for _ in range(num_new)]

    def _collect(self) -> Iterator[tuple[int, Outcome]]:
        """Wait until a process says something or exceeds its time; yield the calls that ended."""
        pending = {worker.connection: worker for worker in self._workers if worker.is_pending}
        if not pending:
            return
        until = min(worker.deadline for worker in pending.values())
        left = min(_LOOK_S, max(0.0, until - time.monotonic()))
        multiprocessing.connection.wait(list(pending), left)
        for connection, worker in pending.items():
            position = worker.position
            # Looked at anew: the caller may have kept the outcome before it for long.
            if connection.poll() or not worker.is_alive:
                answer = worker.take()
            elif time.monotonic() >= worker.deadline:
                answer = worker.expire()
            else:
                continue
            if position is not None:
                yield position, Outcome(**answer)
            elif "refused" in answer:
                raise UserError(answer["refused"])
            elif "error" in answer:
                raise RunError(
                    f"a scoring process did not start ({answer['error']})", role="reward"
                )


class _Worker:
    """One process: starting, then ready, with a call (`position` of it) or without."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mcore_rl.rewards.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # It finds what this process finds: functions of plug-ins are imported by name.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        self.is_ready = False
        self.position: int | None = None
        self._limit_s: float | None = None
        self._begin(_START_LIMIT_S)
        self._send(pickle.dumps(setup))  # one that is gone already is found out by `take`

    @property
    def is_alive(self) -> bool:
        # Not reaped: until `kill` the number of the process and its group stays taken.
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return (
            self.process.returncode is None and os.waitid(os.P_PID, self.process.pid, look) is None
        )

    @property
    def is_pending(self) -> bool:
        """Whether it owes an answer; one that was killed here owes none."""
        is_killed = self.process.returncode is not None
        return not is_killed and (not self.is_ready or self.position is not None)

    def give(self, position: int, call: RewardCall, limit_s: float | None) -> bool:
        """Hand over a call; False if the process has died."""
        if not self._send(pickle.dumps(call)):
            self.kill()
            return False
        self.position = position
        self._begin(limit_s)
        return True

    def take(self) -> dict[str, Any]:
        """Return its answer, or what ended it."""
        self.position = None
        try:
            if not self.connection.poll():  # dead, and what it forked keeps the connection open
                raise EOFError
            answer = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return {"error": f"the process ended ({self._end()})"}
        self.is_ready = True
        return answer

    def expire(self) -> dict[str, Any]:
        """Kill it and return that as its answer."""
        self.kill()
        self.position = None
        return {"error": f"TimeLimitExceeded: no result after {self._limit_s:g} s"}

    def kill(self) -> None:
        """Kill the process and everything that it started, and wait for it."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.connection.close()

    def _end(self) -> str:
        """Return how the process ended, which has closed its connection."""
        until = time.monotonic() + 1.0
        while self.is_alive and time.monotonic() < until:
            time.sleep(0.005)
        self.kill()
        code = self.process.returncode
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def _begin(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self.deadline = math.inf if limit_s is None else time.monotonic() + limit_s

    def _send(self, message: bytes) -> bool:
        try:
            self.connection.send_bytes(message)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    workers.clear()
