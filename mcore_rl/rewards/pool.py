"""Processes that score: several at a time, each killed when it takes too long.

Reward functions run in processes of their own, because nothing else stops a function that hangs in
a call into C, ends its process or eats the memory. Processes start when there is work, serve call
after call, and are replaced when they were killed or died; they hold no torch, so starting one
takes a fraction of a second.

A process scores one response at a time, or several where the function is `async`; a batch function
gets all responses of a run in one call.

Invariants: every call gets an outcome, or an error ends `run`; a process that did not answer in
time is dead, with all of its group, before its outcome is seen; of calls that were in one process
when it ended each is done again alone, so only the one at fault fails; no process outlives the pool
or the program.
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
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mcore_rl.errors import RunError, StoppedError, UserError
from mcore_rl.processes import ending
from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
from mcore_rl.rewards.custom import is_async
from mcore_rl.rewards.worker import Answer, Job, RewardCall, WorkerSetup, time_limit_exceeded

_START_LIMIT_S = 300.0
"""Longest time for a process to start and import a custom function."""
_LOOK_S = 1.0
"""Seconds between checks for ended processes whose children still hold the connection."""
_GRACE_S = 5.0
"""Seconds to wait beyond the limit of an async call, which its process cancels by itself."""
_SEND_LIMIT_S = 10
"""Longest time to send a call; a blocked event loop accepts none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one call."""

    score: float = 0.0
    answer: str | None = None
    """The answer that the response states, "" for none; None: the function gives no answers."""
    others: Mapping[str, float] = field(default_factory=dict)
    """The further numbers that the function returned."""
    error: str | None = None
    """Why there is no score, on one line."""
    timed_out: bool = False
    """Whether the reason is the time limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A job of the pool."""

    positions: Sequence[int]
    """Of its calls."""
    job: Job
    is_async: bool
    is_alone: bool = False
    """Whether its process does nothing else meanwhile."""


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
        self._is_interrupted = False
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
            for _ in self._collect(collections.deque()):
                pass

    def run(self, calls: Sequence[RewardCall]) -> Iterator[tuple[int, Outcome]]:
        """Yield the position and outcome of every call, in the order in which they end.

        A caller that stops early leaves no call running.

        Raises:
            UserError, RunError: as `start`.
            StoppedError: within a second of an interruption.
        """
        waiting = collections.deque(self._tasks(calls))
        num_left = len(calls)
        try:
            while num_left:
                if self._is_interrupted:
                    raise StoppedError
                self._dispatch(waiting)
                for outcome in self._collect(waiting):
                    num_left -= 1
                    yield outcome
        finally:
            for worker in self._workers:
                if worker.tasks:
                    worker.kill()
            self._drop_dead()

    def interrupt(self) -> None:
        """Have `run` raise StoppedError, now and from now on; from any thread."""
        self._is_interrupted = True

    def close(self) -> None:
        """End all processes."""
        self._close()

    def _tasks(self, calls: Sequence[RewardCall]) -> list[_Task]:
        kind: Mapping[str, bool] = {}
        if any(call.function is None for call in calls):
            self.start()
            kind = next(worker.kind for worker in self._workers if worker.is_ready)
        limit_s = self._cfg.timeout_s
        if kind.get("is_batch"):
            whole_s = None if limit_s is None else limit_s * len(calls)
            job = Job(number=0, calls=calls, is_batch=True, limit_s=whole_s)
            return [_Task(positions=range(len(calls)), job=job, is_async=kind["is_async"])]
        return [
            _Task(
                positions=[number],
                job=Job(number=number, calls=[call], is_batch=False, limit_s=limit_s),
                is_async=is_async(call.function) if call.function else kind["is_async"],
            )
            for number, call in enumerate(calls)
        ]

    def _drop_dead(self) -> None:
        """Drop dead processes without an unanswered call; `_collect` handles the others."""
        dead = [w for w in self._workers if not w.is_pending and not w.is_alive]
        for worker in dead:
            worker.kill()  # its children may still run
        self._workers[:] = [worker for worker in self._workers if worker not in dead]

    def _dispatch(self, waiting: collections.deque[_Task]) -> None:
        self._drop_dead()
        while waiting and (worker := self._free_for(waiting[0])):
            task = waiting.popleft()
            if not worker.give(task):
                waiting.extendleft([task, *_alone(worker.end())])
        num_free = sum(not worker.tasks for worker in self._workers)
        num_new = min(len(waiting) - num_free, self._cfg.max_workers - len(self._workers))
        self._workers += [_Worker(self._setup) for _ in range(num_new)]

    def _free_for(self, task: _Task) -> _Worker | None:
        """Return the process with the least work, if one can take the task."""
        ready = [worker for worker in self._workers if worker.is_ready and not worker.is_killed]
        worker = min(ready, key=lambda worker: len(worker.tasks), default=None)
        if worker is None or not worker.tasks:
            return worker
        most, tasks = self._cfg.max_concurrency, worker.tasks.values()
        has_room = (
            len(tasks) < math.ceil(most / self._cfg.max_workers)
            and sum(len(worker.tasks) for worker in ready) < most
        )
        shares = all(one.is_async and not one.is_alone for one in (task, *tasks))
        return worker if has_room and shares else None

    def _collect(self, waiting: collections.deque[_Task]) -> Iterator[tuple[int, Outcome]]:
        """Wait until a process says something or exceeds its time; yield the calls that ended, and
        put those back among the waiting that are to be done again."""
        pending = {worker.connection: worker for worker in self._workers if worker.is_pending}
        if not pending:
            return
        until = min(worker.deadline for worker in pending.values())
        left = min(_LOOK_S, max(0.0, until - time.monotonic()))
        multiprocessing.connection.wait(list(pending), left)
        for connection, worker in pending.items():
            # Checked again: the caller may have taken long with the previous outcome.
            if connection.poll() or not worker.is_alive:
                task, answers = worker.take()
            elif time.monotonic() >= worker.deadline:
                task, answers = worker.expire()
            else:
                continue
            if task is None and "refused" in answers[0]:
                raise UserError(answers[0]["refused"])
            if task is None and "error" in answers[0]:
                reason = answers[0]["error"]
                raise RunError(f"a scoring process did not start ({reason})", role="reward")
            if worker.is_killed:
                waiting.extendleft(_alone(worker.end()))
            if task is not None:
                for position, answer in zip(task.positions, answers, strict=True):
                    yield position, Outcome(**answer)


def _alone(tasks: Sequence[_Task]) -> list[_Task]:
    return [replace(task, is_alone=True) for task in tasks]


class _Worker:
    """One process: starting, then ready, with tasks or without."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        with socket.socket(fileno=os.dup(self.connection.fileno())) as ours:
            limit = struct.pack("ll", _SEND_LIMIT_S, 0)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mcore_rl.rewards.worker"),
                *(str(theirs.fileno()), str(os.getpid())),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            # It finds what this process finds: functions of plug-ins are imported by name.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        self.is_ready = False
        self.kind: Mapping[str, bool] = {}
        """Of the custom function: "is_async" and "is_batch"; known when it is ready."""
        self.tasks: dict[int, _Task] = {}
        """Its present tasks, by number."""
        self._deadlines = {-1: time.monotonic() + _START_LIMIT_S}
        """Deadlines by number of the task; -1: until it is ready."""
        self._send(pickle.dumps(setup))  # `take` notices a process that is already gone

    @property
    def deadline(self) -> float:
        return min(self._deadlines.values())

    @property
    def is_killed(self) -> bool:
        return self.process.returncode is not None

    @property
    def is_alive(self) -> bool:
        # Not reaped: until `kill` the number of the process and its group stays taken.
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return not self.is_killed and os.waitid(os.P_PID, self.process.pid, look) is None

    @property
    def is_pending(self) -> bool:
        """Whether an answer is missing; a process that was killed here sends none."""
        return not self.is_killed and (not self.is_ready or bool(self.tasks))

    def give(self, task: _Task) -> bool:
        """Send a task; False if the process has died or accepts nothing."""
        if not self._send(pickle.dumps(task.job)):
            self.kill()
            return False
        limit_s, number = task.job.limit_s, task.job.number
        grace_s = _GRACE_S if task.is_async else 0.0
        self.tasks[number] = task
        self._deadlines[number] = (
            math.inf if limit_s is None else time.monotonic() + limit_s + grace_s
        )
        return True

    def take(self) -> tuple[_Task | None, list[Answer]]:
        """Return a task that is done and its answers, or what ended the process; None for the task
        where it is ready, where it did not start, or where `end` has the tasks."""
        try:
            if not self.connection.poll():  # dead, and what it forked keeps the connection open
                raise EOFError
            message: dict[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            return self._fail({"error": f"the process ended ({self._end()})"})
        if self.is_ready:
            return self._pop(message["job"]), message["answers"]
        if "refused" not in message:
            self.is_ready, self.kind = True, message
            del self._deadlines[-1]
        return None, [message]

    def expire(self) -> tuple[_Task | None, list[Answer]]:
        """Kill it, because a task takes too long; return as `take`."""
        self.kill()
        if not self.is_ready:
            return None, [time_limit_exceeded(_START_LIMIT_S)]
        [first, *_] = self.tasks.values()
        return self._fail(time_limit_exceeded(first.job.limit_s))

    def _fail(self, answer: Answer) -> tuple[_Task | None, list[Answer]]:
        """Return its only task with this answer; if it has several, the faulty one is not known."""
        if len(self.tasks) == 1:
            task = self._pop(*self.tasks)
            return task, [answer] * len(task.positions)
        return None, [{} if self.tasks else answer]

    def _pop(self, number: int) -> _Task:
        del self._deadlines[number]
        return self.tasks.pop(number)

    def end(self) -> list[_Task]:
        """Return the tasks that the process, which has been killed, leaves behind."""
        tasks, self.tasks = list(self.tasks.values()), {}
        return tasks

    def kill(self) -> None:
        """Kill the process and everything that it started, and wait for it."""
        if not self.is_killed:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.connection.close()

    def _end(self) -> str:
        """Return how the process ended, which has closed its connection."""
        until = time.monotonic() + 1.0
        while self.is_alive and time.monotonic() < until:
            time.sleep(0.005)
        self.kill()
        return ending(self.process.returncode)

    def _send(self, message: bytes) -> bool:
        try:
            self.connection.send_bytes(message)
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            return False
        return True


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    workers.clear()
