"""Sockets between the processes of a run; nobody else can send a message to them.

On one machine they lie in a folder that only this user may enter; between machines they are keyed
and encrypted (CURVE), with keys that all processes of the run derive from its secret.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import socket
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import zmq
import zmq.auth.thread
from zmq.utils import z85

logger = logging.getLogger(__name__)


def address_towards(host: str, port: int = 9) -> str:
    """Return the IPv4 address of this machine on the way to another one, which reaches it there.

    Args:
        host: name or address of the other.
        port: of the other; nothing is sent there.

    Raises:
        OSError: if there is no way.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """Return the name of this machine's network interface that has an IPv4 address: "eth0"."""
    import psutil  # a moment; no controller on one machine needs it

    for name, found in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == address for one in found):
            return name
    return None


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process listens, and the secret that proves that a peer belongs to its run."""

    endpoint: str
    """"ipc:///tmp/mcore_rl-x/calls" or "tcp://10.0.0.1:40001"."""
    secret: bytes = field(repr=False)

    @property
    def token(self) -> str:
        """The token that a connecting process sends."""
        return self._derived(b"token").hex()

    @property
    def is_encrypted(self) -> bool:
        """Whether it is reached over a network."""
        return self.endpoint.startswith("tcp:")

    @property
    def host(self) -> str | None:
        """Address of the machine; None: only this machine can reach it."""
        return urlsplit(self.endpoint).hostname if self.is_encrypted else None

    def beside(self, name: str) -> Address:
        """Return an address for another socket of the run, of this process's machine: in the same
        folder, or a free port on the way to this address."""
        if self.host is None:
            folder = self.endpoint.rpartition("/")[0]
            return Address(f"{folder}/{name}", self.secret)
        return Address(f"tcp://{address_towards(self.host)}:*", self.secret)

    def keys(self, side: bytes) -> tuple[bytes, bytes]:
        """Return (public, secret) CURVE keys of the "server" or the "client", as Z85."""
        secret = z85.encode(self._derived(side))
        return zmq.curve_public(secret), secret

    def _derived(self, purpose: bytes) -> bytes:
        return hashlib.blake2b(self.secret, digest_size=32, person=purpose).digest()


class ServerSocket:
    """A ROUTER that is bound to an address, in a context of its own.

    Args:
        address: "tcp://10.0.0.1:*" takes a free port, see `endpoint`.
    """

    def __init__(self, address: Address) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.ROUTER)
        _without_limits(self.socket, linger_ms=0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to one who is gone is an error
        self._keeper: zmq.auth.thread.ThreadAuthenticator | None = None
        if address.is_encrypted:
            self._keeper = zmq.auth.thread.ThreadAuthenticator(self._context, log=logger)
            self._keeper.start()
            self._keeper.configure_curve_callback("*", credentials_provider=_OneKey(address))
            self.socket.curve_publickey, self.socket.curve_secretkey = address.keys(b"server")
            self.socket.curve_server = True
        self.socket.bind(address.endpoint)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def close(self) -> None:
        """Close it; what is not sent is lost."""
        if self._keeper is not None:
            self._keeper.stop()
        self.socket.close(0)
        self._context.term()


class ClientSocket:
    """A DEALER that is connected to an address, in a context of its own.

    Args:
        address: of the server.
        linger_ms: time at the end for sending the last messages.
        is_lost_on: events of ZeroMQ's monitor that say that the server is gone.
    """

    def __init__(
        self, address: Address, linger_ms: int, is_lost_on: int = zmq.EVENT_DISCONNECTED
    ) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        _without_limits(self.socket, linger_ms)
        if address.is_encrypted:
            self.socket.curve_publickey, self.socket.curve_secretkey = address.keys(b"client")
            self.socket.curve_serverkey = address.keys(b"server")[0]
        self.lost = self.socket.get_monitor_socket(is_lost_on)
        """Readable when the server is gone."""
        self.socket.connect(address.endpoint)

    def close(self) -> None:
        """Close it."""
        self.socket.disable_monitor()
        self.lost.close(0)
        self.socket.close()
        self._context.term()


def _without_limits(socket: Any, linger_ms: int) -> None:
    """Let the socket hold any number of messages: the sender limits their bytes."""
    socket.setsockopt(zmq.LINGER, linger_ms)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)


class _OneKey:
    """Lets in whoever has the key that all processes of the run have."""

    def __init__(self, address: Address) -> None:
        self._key = address.keys(b"client")[0]

    def callback(self, domain: str, key: bytes) -> bool:
        return hmac.compare_digest(key, self._key)
