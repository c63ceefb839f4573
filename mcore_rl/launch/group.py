"""The workers behind a channel, as the controller calls them, and the watch on them.

One thread owns the socket and watches. It reports a process that has ended within a second or two,
and one that cannot be reached over the network within `SILENCE_S`. When no call makes progress for
`trainer.hang_timeout_s`, it prints the Python stacks of all ranks. Each of these ends the run: all
futures raise the same error, and a controller that is busy elsewhere is ended after `GRACE_S`.

An engine that is a process of its own can be lost alone: the calls to it fail, and it may be
started again. An engine that does not answer is killed, so that nothing waits for it. A lost node
process means a lost machine, and that ends the run.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mcore_rl.cluster.group import Call
from mcore_rl.errors import EngineLostError, HangError, RunError, UserError, WorkerLostError
from mcore_rl.frames import Frame, decode, encode, num_bytes
from mcore_rl.launch import channel
from mcore_rl.launch.channel import SILENCE_S, Listener, Received
from mcore_rl.launch.processes import Ended, Processes
from mcore_rl.printable import printable
from mcore_rl.sockets import Address

logger = logging.getLogger(__name__)

R = TypeVar("R")

HELLO_LIMIT_S = 300.0
"""Seconds until a worker must say hello: Python starts and imports a little, on a busy machine."""
START_LIMIT_S = 3600.0
"""Seconds for all workers to import libraries and load weights; the hang timeout if longer."""
STOPPED_SILENCE_S = 6.0
"""A stopped engine of this machine counts as lost after so many seconds without a message."""
BUSY_SILENCE_S = 60.0
"""The same for an engine that is not stopped: on a busy machine, or in a library that blocks other
threads, its messages come late."""
STARTING_SILENCE_S = 180.0
"""The same for an engine, and for a worker of another machine, while it imports libraries, which
can block its threads."""
ECHO_S = 2.0
"""A worker's error may only follow from the end of another worker, seen within these seconds."""
GRACE_S = 5.0
"""Seconds in which the controller may end by itself when its workers have failed."""
REMINDER_S = 60.0
"""Seconds between two log lines that say what the run waits for."""
STACKS_S = 5.0
"""Seconds for the workers to answer with their stacks."""
CLOSE_LIMIT_S = 120.0
"""Seconds for the workers to end in order."""
MAX_BYTES_IN_FLIGHT = 4 << 30
"""Bytes of calls to one worker that are not answered."""

_START, _CLOSE = "start", "close"

GiveUp = Callable[[Exception, Callable[[], None]], None]


@dataclass(slots=True)
class _Pending:
    """A call that is not answered yet."""

    name: str
    step: int | None
    future: Future[Any]
    num_bytes: int


@dataclass(slots=True)
class _Rank:
    """The state of one process, as far as it is known."""

    pending: dict[int, _Pending] = field(default_factory=dict)
    """Calls by number, in the order of submission."""
    heard_at: float | None = None
    progressed_at: float = 0.0
    ticks: int = -1
    is_starting: bool = True
    stacks: str | None = None
    lost: Exception | None = None
    """Why an engine is lost, until it is started again."""
    began_at: float = field(default_factory=time.monotonic)
    machine: str = ""
    """Name and address of its machine, if it is on another one."""
    endpoint: str = ""
    """The address where an engine receives its weights."""

    @property
    def in_flight(self) -> int:
        return sum(pending.num_bytes for pending in self.pending.values())


class RemoteError(Exception):
    """The cause of a worker's error: the traceback as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class ChannelWorkers:
    """A `WorkerGroup` over a channel.

    Args:
        listener: bound; from now on this object owns it.
        processes: workers and engines, started; this object owns them too.
        hang_timeout_s: seconds without progress of any call after which the run ends.
        give_up: reports an error, ends the workers with the function passed to it and then the
            process; used when the main thread does not.
    """

    def __init__(
        self,
        listener: Listener,
        processes: Processes,
        hang_timeout_s: float,
        give_up: GiveUp,
    ) -> None:
        placement = processes.placement
        self.world_size = placement.world_size
        self._engines = {place.rank: place for place in placement.engines}
        self.step: int | None = None
        self._logs: str | None = None
        self._listener, self._processes = listener, processes
        self._hang_timeout_s, self._give_up = hang_timeout_s, give_up
        self._engine_frames: dict[int, list[Frame]] = {}
        first_node = self.world_size + len(self._engines)
        self._nodes = dict(enumerate(processes.nodes, first_node))
        self._ranks = [_Rank() for _ in range(first_node + len(self._nodes))]
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._failed_at = 0.0
        self._echo: tuple[float, Exception] | None = None
        self._hang: tuple[float, str] | None = None
        self._reminded_at = 0.0
        self._is_closing = False
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)
        self._thread.start()

    def start(
        self,
        spec: Any,
        engines: Mapping[int, Any] | None = None,
        logs: Path | None = None,
    ) -> None:
        """Build the object of every process; return when all of them are ready.

        Args:
            spec: of every worker.
            engines: specs by number, of the engines that are processes of their own.
            logs: folder where each process has a file for its log lines.
        """
        self._logs = None if logs is None else str(logs)
        frames = encode((spec, self.world_size, self._hang_timeout_s))
        futures = [
            self._send(rank, channel.START, _START, frames) for rank in range(self.world_size)
        ]
        self._engine_frames = {
            rank: encode((engines or {})[place.engine]) for rank, place in self._engines.items()
        }
        futures += [
            self._send(rank, channel.START, _START, frames)
            for rank, frames in self._engine_frames.items()
        ]
        for future in futures:
            future.result()
        # The objects made at the start stay: the collector need not look at them again and again.
        gc.collect()
        gc.freeze()

    def restart(self, rank: int) -> Future[None]:
        """Start an engine again, without weights; the future is done when it is up. Only the main
        thread may do it."""
        self._lose(rank, "is started again")
        self._processes.restart(self._engines[rank])
        with self._changed:
            self._ranks[rank] = _Rank()
        return self._send(rank, channel.START, _START, self._engine_frames[rank])

    def update_address(self, rank: int) -> Address:
        """Return the address where the engine of a rank receives its weights."""
        return Address(self._ranks[rank].endpoint, self._listener.address.secret)

    def submit(self, calls: Mapping[int, Call[R]]) -> dict[int, Future[R]]:
        """See `WorkerGroup`. Waits while more bytes are in flight to a worker than allowed."""
        encoded: dict[int, list[Frame]] = {}
        futures = {}
        for rank, call in calls.items():
            if id(call) not in encoded:
                encoded[id(call)] = encode((call.method, call.args))
            futures[rank] = self._send(rank, channel.CALL, call.name, encoded[id(call)])
        return futures

    def interrupt(self) -> None:
        """See `WorkerGroup`."""
        for rank in range(len(self._ranks)):
            self._listener.send(rank, channel.INTERRUPT, {})

    def close(self) -> None:
        """End all workers in order."""
        self._is_closing = True
        gc.unfreeze()
        futures = [
            self._send(rank, channel.END, _CLOSE, [])
            for rank, state in enumerate(self._ranks)
            if state.lost is None
        ]
        _, late = wait(futures, CLOSE_LIMIT_S)
        problems = [
            problem for future in futures if future.done() and (problem := future.exception())
        ]
        if problems:
            logger.warning("while the workers closed: %s", problems[0])
        elif late or not self._processes.wait(CLOSE_LIMIT_S):
            logger.warning("the workers did not end within %d s: killed", CLOSE_LIMIT_S)
        self._stop()

    def failure_within(self, seconds: float) -> Exception | None:
        """Return why the workers have failed, if that becomes known within the time."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, seconds)
            return self._failure

    def kill(self) -> None:
        """End all workers at once, and the watch on them."""
        self._is_closing = True
        for rank in range(len(self._ranks)):
            self._listener.send(rank, channel.DIE, {})
        self._stop()

    def _stop(self) -> None:
        """End the watch and the remaining processes, and remove what they leave."""
        self._is_stopped.set()
        self._listener.wake_up()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._processes.kill()

    def _send(self, rank: int, kind: bytes, name: str, frames: list[Frame]) -> Future[Any]:
        size, state = num_bytes(frames), self._ranks[rank]
        future: Future[Any] = Future()
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._failure is not None
                    or state.lost is not None
                    or not state.pending
                    or state.in_flight + size <= MAX_BYTES_IN_FLIGHT
                )
            )
            if self._failure is not None:
                raise self._failure
            if state.lost is not None:
                future.set_exception(state.lost)
                return future
            number = next(self._numbers)
            if not state.pending:
                state.progressed_at = time.monotonic()
            state.pending[number] = _Pending(name, self.step, future, size)
            header = {"id": number, "step": self.step, "name": name}
            if kind == channel.START:
                header["logs"] = self._logs
            self._listener.send(rank, kind, header, frames)

        def tell(ended: Future[Any]) -> None:
            if ended.cancelled():
                self._listener.send(rank, channel.CANCEL, {"id": number})

        future.add_done_callback(tell)
        return future

    def _run(self) -> None:
        next_beat = 0.0
        while not self._is_stopped.is_set():
            received, unreachable = self._listener.poll()
            for message in received:
                self._take(message)
            now = time.monotonic()
            if self._failure is not None:
                if not self._is_closing and now - self._failed_at > GRACE_S:
                    self._give_up(self._failure, self.kill)
                continue
            for rank in unreachable if not self._is_closing else ():
                if self._processes.is_remote(rank):  # a local process's end is soon known
                    self._lose(rank, "cannot be reached any more")
            if now >= next_beat or self._echo is not None:
                self._watch(now)
                next_beat = now + channel.BEAT_S
        self._listener.poll()  # the last messages
        self._listener.close()

    def _take(self, message: Received) -> None:
        state, now = self._ranks[message.rank], time.monotonic()
        state.heard_at = now
        match message.kind:
            case channel.HELLO:
                if message.peer:
                    state.machine = f"{message.header['host']}, {message.peer}"
                state.is_starting = message.rank not in self._nodes
                if message.header["code"] != channel.code_version():
                    found = f"runs other code than the controller, on {message.header['host']}"
                    self._lose(message.rank, found)
            case channel.BEAT:
                self._processes.heard(message.header)
                if message.header["ticks"] != state.ticks:
                    state.ticks, state.progressed_at = message.header["ticks"], now
            case channel.STACKS:
                state.stacks = bytes(message.frames[0]).decode(errors="replace")
            case channel.RESULT | channel.ERROR if message.header["id"] in state.pending:
                self._settle(message, state, now)

    def _settle(self, message: Received, state: _Rank, now: float) -> None:
        with self._changed:
            pending = state.pending.pop(message.header["id"])
            state.progressed_at = now
            state.is_starting = False
            self._changed.notify_all()
        if pending.future.cancelled() or self._failure is not None:
            return
        try:
            value = decode(message.frames)
        except Exception as error:  # noqa: BLE001  the classes of an answer may raise anything
            problem = f"the answer cannot be read: {type(error).__name__}: {error}"
            role = f"worker, {pending.name}"
            self._fail(RunError(problem, rank=message.rank, role=role, step=pending.step))
            return
        if message.kind == channel.RESULT:
            if pending.name == _START:
                state.endpoint = value
            pending.future.set_result(value)
            return
        error, trace = value
        error.__cause__ = RemoteError(trace)
        if message.rank in self._engines and not isinstance(error, UserError):
            pending.future.set_exception(error)  # only this call fails
            return
        with self._changed:
            state.pending[message.header["id"]] = pending  # raises with the others
        if isinstance(error, UserError):
            self._fail(error)
        elif self._echo is None:
            self._echo = now + ECHO_S, error

    def _watch(self, now: float) -> None:
        for rank, ended in self._processes.ended().items():
            is_known = self._is_closing and ended.exit_code in (0, None)
            if not is_known and self._ranks[rank].lost is None:
                self._lose(rank, f"the process {ended.text}", ended)
        if self._echo is not None and now > self._echo[0]:
            self._fail(self._echo[1])
        for rank, state in enumerate(self._ranks):
            if state.lost is not None:
                continue
            if state.heard_at is not None:
                self._listener.send(rank, channel.PING, {})
                if now - state.heard_at > self._silence_s(rank):
                    self._lose(rank, f"sent no message for {now - state.heard_at:.0f} s")
            elif now - state.began_at > HELLO_LIMIT_S:
                self._lose(rank, f"did not say hello within {HELLO_LIMIT_S:.0f} s")
        self._watch_progress(now)

    def _silence_s(self, rank: int) -> float:
        """Return how many seconds a process may be silent. A worker of this machine that hangs is
        found by the watch on progress."""
        is_remote = self._processes.is_remote(rank)
        if rank not in self._engines and not is_remote:
            return math.inf
        if self._ranks[rank].is_starting:
            return STARTING_SILENCE_S
        if is_remote:
            return SILENCE_S
        return STOPPED_SILENCE_S if self._processes.state(rank).is_stopped else BUSY_SILENCE_S

    def _where(self, rank: int) -> str:
        """Return what is known of a process that does not answer."""
        machine = self._ranks[rank].machine
        return ", ".join(filter(None, [self._processes.state(rank).text, machine]))

    def _watch_progress(self, now: float) -> None:
        waited_for = [(rank, state) for rank, state in enumerate(self._ranks) if state.pending]
        if not waited_for or self._is_closing:
            return
        starting = any(state.is_starting for _, state in waited_for)
        limit = max(self._hang_timeout_s, START_LIMIT_S) if starting else self._hang_timeout_s
        if self._hang is None:
            quiet_s = now - max(state.progressed_at for _, state in waited_for)
            if quiet_s < min(REMINDER_S, limit):
                self._reminded_at = now - quiet_s
                return
            calls = sorted({next(iter(state.pending.values())).name for _, state in waited_for})
            ranks = ", ".join(str(rank) for rank, _ in waited_for)
            what = f"{' and '.join(calls)} of ranks {ranks}"
            if quiet_s < limit:
                if now - self._reminded_at >= REMINDER_S:
                    self._reminded_at = now
                    logger.info("waiting for %s: no progress for %.0f s", what, quiet_s)
                return
            self._hang = now + STACKS_S, f"no progress for {limit:g} s while waiting for {what}"
            for rank in range(len(self._ranks)):
                self._listener.send(rank, channel.STACKS, {})
        silent = [
            rank
            for rank, state in enumerate(self._ranks)
            if state.stacks is None and state.lost is None
        ]
        if silent and now < self._hang[0]:
            return
        stacks = "".join(
            f"--- rank {rank} ---\n{state.stacks or self._where(rank)}\n"
            for rank, state in enumerate(self._ranks)
        )
        sys.stderr.write(printable(stacks))
        named = "; ".join(f"rank {rank} does not answer ({self._where(rank)})" for rank in silent)
        suspect = silent[0] if silent else None
        first = next(iter(waited_for[0][1].pending.values()))
        message = "; ".join(filter(None, [self._hang[1], named]))
        message += " (trainer.hang_timeout_s)" if not starting else ""
        self._fail(HangError(message, rank=suspect, role=f"worker, {first.name}", step=first.step))

    def _lose(self, rank: int, problem: str, ended: Ended | None = None) -> None:
        if ended is None and (where := self._where(rank)):
            problem += f" ({where})"
        elif machine := self._ranks[rank].machine:
            problem += f" ({machine})"
        if rank in self._engines and not self._is_closing:
            self._lose_engine(rank, problem)
            return
        if rank in self._nodes:
            self._fail(WorkerLostError(problem, role=f"node {self._nodes[rank]}", step=self.step))
            return
        pending = next(iter(self._ranks[rank].pending.values()), None)
        role = f"worker, {pending.name}" if pending else "worker"
        step = pending.step if pending else self.step
        error = WorkerLostError(problem, rank=rank, role=role, step=step)
        if ended is not None and ended.exit_code is not None and ended.exit_code < 0:
            error.exit_code = 128 - ended.exit_code  # as the shell has it
        self._fail(error)

    def _lose_engine(self, rank: int, problem: str) -> None:
        """Kill the process of an engine; all calls to it fail until it is started again."""
        state, place = self._ranks[rank], self._engines[rank]
        with self._changed:
            if state.lost is not None:
                return
            calls = list(state.pending.values())
            role = f"engine {place.engine}" + (f", {calls[0].name}" if calls else "")
            step = calls[0].step if calls else self.step
            state.lost = EngineLostError(problem, role=role, step=step)
            state.pending.clear()
            self._changed.notify_all()
        self._processes.kill_one(rank)
        self._listener.forget(rank)
        for call in calls:
            if not call.future.done():
                call.future.set_exception(state.lost)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            if self._failure is not None:
                return
            if not self._is_closing:
                self._failure, self._failed_at = error, time.monotonic()
            futures = [p.future for state in self._ranks for p in state.pending.values()]
            self._changed.notify_all()
        for future in futures:
            if not future.done():
                future.set_exception(error)
