"""The message channel between the controller and its workers: ZeroMQ, one socket on each side.

    controller -> worker   START(spec)  CALL(id, step, method, arguments)  CANCEL(id)  INTERRUPT
                           PING  STACKS  END  DIE
    controller -> node     SPAWN(program)  KILL(rank)  PING  STACKS  END  DIE
    worker -> controller   HELLO(rank, token, code)  RESULT(id)  ERROR(id)  BEAT(ticks)
                           STACKS(text)

At both ends one thread owns the socket, so heartbeats and stacks are sent while the process works.
On one machine the sockets lie in a folder that only this user may enter; between machines they are
bound to one address, encrypted and authenticated (CURVE, keys made from the run's secret). Messages
of a process without the token of the secret are dropped, because messages are unpickled.

A worker does its calls in order. The bytes in flight to one worker are bounded; `submit` waits for
room. This file does not know how processes are started: see `Processes`.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import hmac
import json
import logging
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import zmq

from mcore_rl import interruption, progress
from mcore_rl.frames import Frame, decode, encode
from mcore_rl.sockets import Address, ClientSocket, ServerSocket

logger = logging.getLogger(__name__)

BEAT_S = 1.0
"""Seconds between two heartbeats of either side."""
SILENCE_S = 20.0
"""Over a network, the other side counts as lost after so many seconds without a message."""
_POLL_MS = 200

HELLO, RESULT, ERROR, BEAT, STACKS = b"hello", b"result", b"error", b"beat", b"stacks"
START, CALL, CANCEL, PING, END, DIE = b"start", b"call", b"cancel", b"ping", b"end", b"die"
SPAWN, KILL = b"spawn", b"kill"
INTERRUPT = b"interrupt"


@cache
def code_version() -> str:
    """Return a digest of the package's source: processes of a run must run the same."""
    package = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def thread_stacks() -> str:
    """Return the Python stack of every thread of this process."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in sys._current_frames().items()
    )


_MORE, _NO_WAIT = int(zmq.SNDMORE), int(zmq.NOBLOCK)


def _send(socket: zmq.Socket[bytes], frames: Sequence[Frame]) -> None:
    """Do the same as `send_multipart` in half its time: the flags of every frame are plain."""
    for frame in frames[:-1]:
        socket.send(frame, _MORE, copy=False)
    socket.send(frames[-1], copy=False)


def _receive(socket: zmq.Socket[bytes]) -> list[zmq.Frame]:
    """Do the same as `recv_multipart` in half its time; raises `zmq.Again` if nothing is there."""
    frames = [socket.recv(_NO_WAIT, copy=False)]
    while frames[-1].more:
        frames.append(socket.recv(copy=False))
    return frames


class _Outbox:
    """Messages of other threads to the one that owns the socket. Each message wakes it."""

    def __init__(self) -> None:
        self._messages: collections.deque[list[Any]] = collections.deque()
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_open = True
        self._lock = threading.Lock()  # the number of a closed descriptor may be used again

    def put(self, message: list[Any]) -> None:
        self._messages.append(message)
        self.wake_up()

    def wake_up(self) -> None:
        with self._lock:
            if self._is_open:
                os.eventfd_write(self.wake, 1)

    def take(self) -> list[list[Any]]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.wake)
        taken = []
        while self._messages:
            taken.append(self._messages.popleft())
        return taken

    def close(self) -> None:
        with self._lock:
            self._is_open = False
            os.close(self.wake)


@dataclass(frozen=True, slots=True)
class Received:
    """One message from a worker that has proved that it knows the secret."""

    rank: int
    kind: bytes
    header: dict[str, Any]
    frames: Sequence[Frame]
    peer: str
    """In a hello: the address of the worker's machine; "" for this machine."""


class Listener:
    """The controller's socket. One thread owns it; others may call only `send` and `wake_up`.

    Args:
        address: to listen at; "tcp://10.0.0.1:*" takes a free port, see `address`.
    """

    def __init__(self, address: Address) -> None:
        self._server = ServerSocket(address)
        self._socket = self._server.socket
        self.address = Address(self._server.endpoint, address.secret)
        """The address at which it listens."""
        self._ranks: dict[bytes, int] = {}
        self._identities: dict[int, bytes] = {}
        self._gone: set[bytes] = set()
        self._outbox = _Outbox()
        self._held_back: dict[int, list[list[Any]]] = collections.defaultdict(list)

    def send(self, rank: int, kind: bytes, header: Mapping[str, Any], frames: Sequence[Frame] = ()):
        """Send a message to a rank, once it has said hello; from any thread."""
        self._outbox.put([rank, kind, json.dumps(header).encode(), *frames])

    def wake_up(self) -> None:
        """Make `poll` return; from any thread, also after the listener has closed."""
        self._outbox.wake_up()

    def poll(self) -> tuple[list[Received], set[int]]:
        """Send the waiting messages; return (messages received, ranks that can no longer be
        reached)."""
        readable, _, _ = zmq.select([self._socket, self._outbox.wake], [], [], _POLL_MS / 1000)
        lost = set()
        for rank, *message in self._outbox.take():
            if rank not in self._identities:
                self._held_back[rank].append(message)
            elif not self._pass_on(rank, message):
                lost.add(rank)
        received = []
        while self._socket in readable:
            try:
                frames = _receive(self._socket)
            except zmq.Again:
                break
            if (message := self._admitted(frames)) is not None:
                received.append(message)
        return received, lost

    def _pass_on(self, rank: int, message: list[Any]) -> bool:
        try:
            _send(self._socket, [self._identities[rank], *message])
        except zmq.ZMQError:  # EHOSTUNREACH
            return False
        return True

    def _admitted(self, frames: list[zmq.Frame]) -> Received | None:
        """Return the message if its sender has proved that it knows the secret; None otherwise."""
        identity, *rest = frames
        sender = identity.bytes
        if sender in self._gone:
            return None
        try:
            kind, header = rest[0].bytes, json.loads(rest[1].bytes)
            if sender not in self._ranks:
                shown = str(header["token"])
                if kind != HELLO or not hmac.compare_digest(shown, self.address.token):
                    raise ValueError("it does not show the token of this run")
                rank = int(header["rank"])
                self._ranks[sender], self._identities[rank] = rank, sender
                for message in self._held_back.pop(rank, []):
                    self._pass_on(rank, message)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            logger.warning("a message from a stranger was dropped: %s", error)
            return None
        bodies = [frame.buffer for frame in rest[2:]]
        is_met = kind == HELLO and self.address.is_encrypted
        peer = str(rest[0].get("Peer-Address")) if is_met else ""
        return Received(self._ranks[sender], kind, header, bodies, peer)

    def forget(self, rank: int) -> None:
        """Stop listening to the process of a rank; another process may say hello in its place."""
        self._held_back.pop(rank, None)
        if (identity := self._identities.pop(rank, None)) is not None:
            self._gone.add(identity)
            del self._ranks[identity]

    def close(self) -> None:
        """Close the socket. Messages that are not sent yet are lost, and so are later ones."""
        self._server.close()
        self._outbox.close()


@dataclass(frozen=True, slots=True)
class Order:
    """The next thing that a worker must do."""

    kind: bytes
    header: Mapping[str, Any]
    frames: Sequence[Frame]

    def read(self) -> Any:
        """Return the content of the order; raises whatever reading it raises."""
        return decode(self.frames)


class WorkerEnd:
    """A worker's end: orders come one by one, answers go back, heartbeats are sent by a thread.

    The process ends at once when the controller says so or is gone. The controller is gone when the
    connection is lost or, over a network, after silence.

    Args:
        address: of the controller.
        rank: of this worker.
        report: returns the content of every heartbeat to the controller.
    """

    def __init__(
        self, address: Address, rank: int, report: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        self._address, self._rank, self._report = address, rank, report
        self._silence_s = SILENCE_S if address.is_encrypted else math.inf
        self._orders: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._outbox = _Outbox()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="channel", daemon=True)
        self._thread.start()

    def next(self) -> Order:
        """Wait for the next order."""
        while True:
            if (order := self._order(*self._orders.get())) is not None:
                return order

    def next_if_any(self) -> Order | None:
        """Return the next order if there is one."""
        while True:
            try:
                message = self._orders.get_nowait()
            except queue.Empty:
                return None
            if (order := self._order(*message)) is not None:
                return order

    def _order(
        self, kind: bytes, header: Mapping[str, Any], frames: Sequence[Frame]
    ) -> Order | None:
        """Return the order of a message, None for one that was cancelled."""
        if kind == CALL and header["id"] in self._cancelled:
            self._outbox.put([ERROR, _header(id=header["id"], cancelled=True)])
            return None
        return Order(kind, header, frames)

    def answer(self, order: Order, value: Any) -> None:
        """Send the result of an order."""
        self._outbox.put([RESULT, _header(id=order.header["id"]), *encode(value)])

    def fail(self, order: Order, error: Exception, trace: str) -> None:
        """Send the error of an order; `error` must be picklable."""
        self._outbox.put([ERROR, _header(id=order.header["id"]), *encode((error, trace))])

    def close(self) -> None:
        """Send the waiting messages and end the connection."""
        self._is_closing.set()
        self._outbox.wake_up()
        self._thread.join()

    def _run(self) -> None:
        client = ClientSocket(self._address, linger_ms=2000)
        socket = client.socket
        hello = {"rank": self._rank, "token": self._address.token, "code": code_version()}
        hello |= {"pid": os.getpid(), "host": os.uname().nodename}
        socket.send_multipart([HELLO, _header(**hello)])
        heard = time.monotonic()
        next_beat = 0.0
        while True:
            sources = [socket, client.lost, self._outbox.wake]
            readable, _, _ = zmq.select(sources, [], [], _POLL_MS / 1000)
            if client.lost in readable:  # the controller never comes back
                end_now()
            for message in self._outbox.take():
                _send(socket, message)
            if self._is_closing.is_set():
                break
            if time.monotonic() >= next_beat:
                socket.send_multipart([BEAT, _header(ticks=progress.ticks(), **self._report())])
                next_beat = time.monotonic() + BEAT_S
            while socket in readable:
                try:
                    frames = _receive(socket)
                except zmq.Again:
                    break
                heard = time.monotonic()
                self._take(socket, frames)
            if time.monotonic() - heard > self._silence_s:
                end_now()
        client.close()

    def _take(self, socket: zmq.Socket[bytes], frames: list[zmq.Frame]) -> None:
        kind, header = frames[0].bytes, json.loads(frames[1].bytes)
        if kind == DIE:
            end_now()
        elif kind == STACKS:
            socket.send_multipart([STACKS, _header(), thread_stacks().encode()])
        elif kind == CANCEL:
            self._cancelled.add(header["id"])
        elif kind == INTERRUPT:
            interruption.ask()
        elif kind != PING:
            self._orders.put([kind, header, [frame.buffer for frame in frames[2:]]])


def _header(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def end_now() -> NoReturn:
    """End this worker without a message: the controller reports the end."""
    os._exit(1)
