"""The controller's socket: who is let in, and what becomes of others."""

from __future__ import annotations

import json
import logging
import os
import time

import pytest
import zmq
import zmq.utils.monitor

from mcore_rl.launch import channel
from mcore_rl.launch.channel import Listener
from mcore_rl.launch.folder import PrivateFolder, is_private
from mcore_rl.sockets import Address

SECRET = bytes(range(32))


@pytest.fixture(params=["ipc", "tcp"])
def listening(request):
    """Yield (listener, its address): over a socket in a private folder, or encrypted."""
    folder = PrivateFolder()
    endpoint = {"ipc": f"ipc://{folder.path}/calls", "tcp": "tcp://127.0.0.1:*"}[request.param]
    made = Listener(Address(endpoint, SECRET))
    yield made, made.address
    made.close()
    folder.remove()


def connect(context, address: Address, with_keys: bool = True):
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    if address.is_encrypted and with_keys:
        socket.curve_publickey, socket.curve_secretkey = address.keys(b"client")
        socket.curve_serverkey = address.keys(b"server")[0]
    socket.connect(address.endpoint)
    return socket


def polled(listener: Listener, until, seconds: float = 20.0):
    """Return what came until the condition holds or time is up."""
    received, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline and not until(received):
        received += listener.poll()[0]
    return received


def hello(address: Address, rank: int = 0):
    return [channel.HELLO, json.dumps({"rank": rank, "token": address.token}).encode()]


def test_who_shows_the_token_is_heard_and_gets_what_was_sent_before(listening):
    listener, address = listening
    listener.send(1, channel.CALL, {"id": 7}, [b"body"])
    with zmq.Context() as context, connect(context, address) as socket:
        socket.send_multipart(hello(address, rank=1))
        socket.send_multipart([channel.BEAT, b'{"ticks": 3}'])
        first, second = polled(listener, lambda received: len(received) == 2)
        assert (first.rank, first.kind) == (1, channel.HELLO)
        assert (second.rank, second.kind, second.header) == (1, channel.BEAT, {"ticks": 3})
        assert socket.recv_multipart() == [channel.CALL, b'{"id": 7}', b"body"]


@pytest.mark.parametrize(
    "message",
    [
        [channel.RESULT, b'{"id": 0}', b"cos\nsystem\n(S'true'\ntR."],
        [channel.HELLO, b'{"rank": 0, "token": "00"}'],
        [channel.HELLO, b"{}"],
        [channel.HELLO, b"no json"],
        [channel.HELLO],
        [b""],
    ],
)
def test_a_stranger_with_access_to_the_socket_is_dropped_and_logged(listening, message, caplog):
    listener, address = listening
    with (
        caplog.at_level(logging.WARNING),
        zmq.Context() as context,
        connect(context, address) as stranger,
        connect(context, address) as worker,
    ):
        stranger.send_multipart(message)
        polled(listener, lambda _: "stranger" in caplog.text)
        assert "a message from a stranger was dropped" in caplog.text
        worker.send_multipart(hello(address))
        (received,) = polled(listener, len)  # it goes on
        assert received.kind == channel.HELLO


@pytest.mark.parametrize("secret", [None, bytes(32)])
def test_between_machines_nobody_without_the_key_gets_through(secret):
    """Not even to where its message would be dropped: the handshake fails."""
    made = Listener(Address("tcp://127.0.0.1:*", SECRET))
    stranger = Address(made.address.endpoint, secret or SECRET)
    with zmq.Context() as context, connect(context, stranger, secret is not None) as socket:
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_CONNECTED)
        socket.send_multipart(hello(Address(made.address.endpoint, SECRET)))
        assert polled(made, len, seconds=1.0) == []
        events = set()
        while monitor.poll(0):
            events.add(zmq.utils.monitor.recv_monitor_message(monitor)["event"])
        assert events == {zmq.EVENT_CONNECTED}
        socket.disable_monitor()
        monitor.close()
    made.close()


def test_a_socket_between_machines_is_bound_to_its_address_alone():
    made = Listener(Address("tcp://127.0.0.1:*", SECRET))
    assert made.address.endpoint.startswith("tcp://127.0.0.1:")
    made.close()


def test_a_worker_that_is_gone_is_noticed_when_something_is_sent_to_it(listening):
    listener, address = listening
    with zmq.Context() as context, connect(context, address) as socket:
        socket.send_multipart(hello(address))
        polled(listener, len)
    deadline, lost = time.monotonic() + 20, set()
    while not lost and time.monotonic() < deadline:
        listener.send(0, channel.PING, {})
        lost = listener.poll()[1]
    assert lost == {0}


def test_what_is_told_a_listener_that_has_closed_goes_nowhere():
    """A thread may learn too late that the one that listens has ended. The number of a closed
    descriptor may have become that of a file, which nobody may write into."""
    made = Listener(Address("tcp://127.0.0.1:*", SECRET))
    made.close()
    successors = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(20)]
    made.wake_up()
    made.send(0, channel.PING, {})
    for successor in successors:
        with pytest.raises(BlockingIOError):  # nothing was written
            os.eventfd_read(successor)
        os.close(successor)


def test_a_private_folder_may_be_entered_by_its_owner_alone(tmp_path):
    folder = PrivateFolder()
    assert is_private(folder.path)
    folder.remove()
    assert not folder.path.exists()
    (tmp_path / "open").mkdir(mode=0o755)
    assert not is_private(tmp_path / "open")
    (tmp_path / "link").symlink_to(tmp_path)
    assert not is_private(tmp_path / "link")
    assert not is_private(tmp_path / "nothing")
