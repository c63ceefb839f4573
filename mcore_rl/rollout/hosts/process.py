"""An engine in a process of its own, and how weight updates reach it.

The train worker that feeds an engine delivers its updates over a socket, one after the other, and
waits until each is loaded; the controller has told the engine to take them. These messages are
small, or the transport sends the tensors by another way.
"""

from __future__ import annotations

import os
import select
import threading
import time
from typing import Any

import psutil
import zmq

from mcore_rl import progress
from mcore_rl.errors import WeightSyncError
from mcore_rl.frames import decode, encode
from mcore_rl.rollout import load_engine
from mcore_rl.rollout.base import EngineSpec
from mcore_rl.rollout.serving import ServingEngine
from mcore_rl.sockets import Address, ClientSocket, ServerSocket
from mcore_rl.weight_sync.base import Link, UpdateSession
from mcore_rl.weight_sync.digest import Manifest

_POLL_MS = 500
CONNECT_LIMIT_S = 60.0
"""Seconds for the train worker to begin, and for each message in a session. If an engine takes
longer, the watch ends it."""


class OwnProcessEngine(ServingEngine):
    """See `ServingEngine`; requests run during other calls, and the process ends when a process
    that the engine has started ends before it.

    Args:
        spec: what the engine starts from.
        link: brings its weights.
    """

    def __init__(self, spec: EngineSpec, link: Link) -> None:
        super().__init__(load_engine(spec, link))
        children = psutil.Process().children(recursive=True)
        watched = {os.pidfd_open(child.pid): child.pid for child in children}
        if watched:
            threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(pids: dict[int, int]) -> None:
    """End this process when one of these ends: the engine would notice it seconds later."""
    select.select(list(pids), [], [])
    os._exit(1)


class UpdateListener:
    """The engine's end: serves one session after the other.

    Args:
        address: to listen at, see `ServerSocket`.
    """

    def __init__(self, address: Address) -> None:
        self._server = ServerSocket(address)
        self.endpoint = self._server.endpoint
        """Where the train worker finds it."""

    def serve(self, session: UpdateSession) -> None:
        """Do a train worker's calls of the session until it is finished.

        Raises:
            WeightSyncError: if no call comes, or the session breaks off.
        """
        deadline = time.monotonic() + CONNECT_LIMIT_S
        while True:
            if not self._server.socket.poll(_POLL_MS):
                if time.monotonic() > deadline:
                    raise WeightSyncError(f"no update for {CONNECT_LIMIT_S:.0f} s", role="rollout")
                continue
            sender, *frames = self._server.socket.recv_multipart(copy=False)
            method, args = decode([frame.buffer for frame in frames])
            try:
                getattr(session, method.__name__)(*args)
            except Exception as error:
                self._answer(sender, f"{type(error).__name__}: {error}")
                session.abort_weight_update()
                raise
            self._answer(sender, "")
            progress.tick()
            deadline = time.monotonic() + CONNECT_LIMIT_S
            if method is UpdateSession.finish_weight_update:
                return
            if method is UpdateSession.abort_weight_update:
                raise WeightSyncError("the update was broken off", role="rollout")

    def _answer(self, to: zmq.Frame, problem: str) -> None:
        self._server.socket.send_multipart([to.bytes, problem.encode()])

    def close(self) -> None:
        """Stop listening."""
        self._server.close()


class RemoteSession:
    """The train worker's end: the `UpdateSession` of an engine in another process.

    Args:
        address: of the engine's `UpdateListener`.
    """

    def __init__(self, address: Address) -> None:
        self.weight_version = self._coming_version = -1
        self._is_open = False
        # It listens from its start: if it cannot be reached, it is gone.
        is_lost_on = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
        self._client = ClientSocket(address, linger_ms=0, is_lost_on=is_lost_on)

    def start_weight_update(self, version: int, with_digests: bool = False) -> None:
        self.weight_version, self._coming_version = -1, version
        self._is_open = True
        self._do(UpdateSession.start_weight_update, version, with_digests)

    def update_weights(self, update: Any) -> None:
        self._do(UpdateSession.update_weights, update)

    def finish_weight_update(self, manifest: Manifest) -> None:
        self._do(UpdateSession.finish_weight_update, manifest)
        self.weight_version, self._is_open = self._coming_version, False

    def abort_weight_update(self) -> None:
        if self._is_open:  # otherwise the engine has failed and given it up
            self._do(UpdateSession.abort_weight_update)
        self._is_open = False

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def _do(self, method: Any, *args: Any) -> None:
        """Make the engine do a call; return when it is done.

        Raises:
            WeightSyncError: if it fails, or the engine is gone.
        """
        was_open, self._is_open = self._is_open, False
        socket = self._client.socket
        socket.send_multipart(encode((method, args)), copy=False)
        while True:
            readable, _, _ = zmq.select([socket, self._client.lost], [], [], _POLL_MS / 1000)
            if socket in readable:
                break
            if self._client.lost in readable:
                raise WeightSyncError("the engine is gone", role="rollout")
        if problem := socket.recv().decode():
            raise WeightSyncError(f"the engine did not take an update: {problem}", role="rollout")
        self._is_open = was_open
        progress.tick()
