"""Every transport of the package: what it brings and leaves, and which of its faults are seen."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import threading
import time
from typing import Any

import pytest
import torch

from mcore_rl import weight_sync
from mcore_rl.errors import UserError, WeightSyncError
from mcore_rl.weight_sync import shared_memory
from mcore_rl.weight_sync.base import TRANSPORTS, Distance, Link, Transport
from mcore_rl.weight_sync.check import RecordingEngine, check_transport, random_buckets
from mcore_rl.weight_sync.sync import sync_one
from tests.unit.weight_sync.engine_process import ProcessEngine

ON_CPU = ("direct", "shared_memory", "gloo", "disk")
BETWEEN_PROCESSES = ON_CPU[1:]


def link_of(name, folder, **fields):
    return Link(transport=name, run_folder=str(folder), engine=0, engine_rank=0, **fields)


def slots():
    return set(shared_memory.FOLDER.glob(f"{shared_memory.PREFIX}*"))


@pytest.mark.parametrize("name", ON_CPU)
def test_every_transport_of_the_package_brings_what_is_sent(name, tmp_path):
    check_transport(name, tmp_path)


@pytest.mark.parametrize("num_receivers", [1, 2])
@pytest.mark.parametrize("name", BETWEEN_PROCESSES)
@pytest.mark.starts_processes
def test_weights_reach_engines_in_processes_of_their_own(name, num_receivers, tmp_path):
    """Each receiver in a process, which keeps all of a session and compares it at the end; a sync
    that breaks off between."""
    link = link_of(name, tmp_path, num_receivers=num_receivers)
    sender, engine = link.open_sender(), ProcessEngine(link)
    try:
        for version in range(3):
            sync_one(random_buckets(version), sender, engine, version)
            assert engine.weight_version == version
            with pytest.raises(RuntimeError, match="broken off"):
                sync_one(broken_off(), sender, engine, 9)
            assert engine.weight_version == -1
    finally:
        engine.close()
        sender.close()
    assert list(tmp_path.iterdir()) == []


def broken_off():
    yield next(iter(random_buckets(0)))
    raise RuntimeError("broken off")


def falsified(bucket, fault):
    """Return a bucket with a fault in the experts of layer 1."""
    tensors = {name: tensor.detach().clone() for name, tensor in bucket}
    first, second = (f"layers.1.experts.{i}.weight" for i in (3, 4))
    if first not in tensors:
        return bucket
    match fault:
        case "one flipped byte":
            tensors[first].view(-1).view(torch.uint8)[7] ^= 16
        case "one lost bucket":
            return []
        case "one swapped expert":
            tensors[first], tensors[second] = tensors[second], tensors[first]
    return list(tensors.items())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("one flipped byte", r"sent: layers\.1\.experts\.3\.weight arrived with other content$"),
        ("one lost bucket", r"sent: layers\.1\.q\.weight did not arrive; .* more$"),
        (
            "one swapped expert",
            r"sent: layers\.1\.experts\.3\.weight arrived .*; layers\.1\.experts\.4\.weight",
        ),
    ],
)
@pytest.mark.parametrize("name", ON_CPU)
def test_what_a_transport_does_to_the_weights_is_seen(name, fault, said, tmp_path, monkeypatch):
    honest: Any = TRANSPORTS.get(name)

    class Faulty(honest.sender):
        def send(self, bucket, deliver):
            super().send(falsified(bucket, fault), deliver)

    kind: Any = Faulty
    faulty = Transport(sender=kind, receiver=honest.receiver, reaches=honest.reaches)
    monkeypatch.setitem(TRANSPORTS._entries, "faulty", faulty)
    link = link_of("faulty", tmp_path)
    sender, engine = link.open_sender(), RecordingEngine([link], name != "direct", keeps=True)
    with pytest.raises(WeightSyncError, match=said):
        sync_one(random_buckets(0), sender, engine, 0)
    assert engine.weight_version == -1
    engine.close()
    sender.close()


def test_what_reaches_where():
    reaches = {name: TRANSPORTS.get(name).reaches for name in weight_sync.__all__}
    assert {name for name in reaches if Distance.SAME_PROCESS in reaches[name]} == set(ON_CPU)
    far = {name for name in reaches if Distance.OTHER_MACHINE in reaches[name]}
    assert far == {"gloo", "disk", "nccl"}


def test_a_handle_of_one_device_is_not_sent_to_several(tmp_path):
    with pytest.raises(UserError, match=r"'ipc' reaches one device, and the engine has 2\. Use"):
        link_of("ipc", tmp_path, num_receivers=2).open_sender()


class Noting:
    """An `UpdateSession` that looks at what is shared while it takes an update."""

    def __init__(self, link, keeps):
        self.inner = RecordingEngine([link], False, keeps)
        self.seen, self.copied, self.modes = [], [], set()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def update_weights(self, update):
        self.inner.update_weights(update)
        self.seen.append(update.slot)
        self.copied.append(update.must_copy)
        self.modes |= {stat.S_IMODE(file.stat().st_mode) for file in slots()}


def noting(link, keeps) -> Any:
    return Noting(link, keeps)


def equal_buckets(num_buckets):
    for number in range(num_buckets):
        yield [(f"w{number}", torch.full((1000,), float(number)))]


def test_a_slot_is_used_again_as_soon_as_the_engine_lets_go_of_it(tmp_path):
    link = link_of("shared_memory", tmp_path)
    sender, engine = link.open_sender(), noting(link, keeps=False)
    sync_one(equal_buckets(9), sender, engine, 0)
    assert len(set(engine.seen)) == 1
    assert not any(engine.copied)
    assert engine.modes == {0o600}


def test_no_more_than_two_slots_are_shared_with_an_engine_that_keeps_all(tmp_path):
    link = link_of("shared_memory", tmp_path)
    sender, engine = link.open_sender(), noting(link, keeps=True)
    sync_one(equal_buckets(9), sender, engine, 0)
    assert len(set(engine.seen)) == 2
    assert engine.copied == [False] + 8 * [True]
    assert [float(tensor[0]) for _, tensor in engine.loaded[0]] == list(range(9))


def test_shared_memory_has_no_name_once_the_receivers_have_it(tmp_path):
    before = slots()
    link = link_of("shared_memory", tmp_path)
    sender, engine = link.open_sender(), RecordingEngine([link], True, keeps=True)
    named = []

    def buckets():
        for bucket in equal_buckets(3):
            yield bucket
            named.append(slots() - before)

    sync_one(buckets(), sender, engine, 0)
    assert named == [set(), set(), set()]


def test_memory_that_is_not_there_is_named(tmp_path, monkeypatch):
    def full(file, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    sender = link_of("shared_memory", tmp_path).open_sender()
    with pytest.raises(WeightSyncError, match=r"/dev/shm has \d+ MiB left, a bucket of .* takes 4"):
        sender.send([("w", torch.zeros(1 << 20))], lambda update: None)


def send_and_hang(folder, connection):
    """Send a bucket to an engine that takes it and never answers."""
    sender = link_of("shared_memory", folder).open_sender()

    def deliver(update):
        connection.send(update.slot)
        time.sleep(600)

    sender.send([("w", torch.zeros(1000))], deliver)


@pytest.mark.starts_processes
def test_what_a_killed_sender_has_left_is_removed_by_the_next_and_what_is_in_use_is_not(tmp_path):
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=send_and_hang, args=(tmp_path, there), daemon=True)
    process.start()
    file = shared_memory.FOLDER / here.recv()
    assert file in slots()
    link_of("shared_memory", tmp_path).open_sender()
    assert file in slots()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert file in slots()
    link_of("shared_memory", tmp_path).open_sender()
    assert file not in slots()


@pytest.mark.parametrize("name", BETWEEN_PROCESSES)
@pytest.mark.starts_processes
def test_a_receiver_that_is_killed_ends_the_sync_and_leaves_nothing(name, tmp_path):
    before = slots()
    link = link_of(name, tmp_path, num_receivers=2)
    sender, engine = link.open_sender(), ProcessEngine(link)

    def buckets():
        yield next(iter(random_buckets(0)))
        os.kill(engine.processes[1].pid, signal.SIGKILL)
        engine.processes[1].join()
        yield from random_buckets(1)

    begin = time.monotonic()
    with pytest.raises((OSError, EOFError, RuntimeError)):
        sync_one(buckets(), sender, engine, 0)
    assert time.monotonic() - begin < 60  # half of the deadline of gloo
    assert engine.weight_version == -1
    engine.close()
    sender.close()
    assert slots() == before
    assert list(tmp_path.iterdir()) == []


def test_a_group_listens_on_the_given_address_alone(tmp_path):
    link = link_of("gloo", tmp_path, address="127.0.0.1")
    sender, engine = link.open_sender(), RecordingEngine([link], True, keeps=False)
    listening = []

    def buckets():
        for bucket in equal_buckets(2):
            yield bucket
            listening.append(own_listeners())

    before = own_listeners()
    sync_one(buckets(), sender, engine, 0)
    new = [address for addresses in listening for address in addresses - before]
    assert new
    assert {host for host, _ in new} == {"127.0.0.1"}


def own_listeners():
    """Return (host, port) of every TCP socket on which this process listens."""
    import psutil

    connections = psutil.Process().net_connections("tcp")
    found = [connection for connection in connections if connection.status == "LISTEN"]
    return {(c.laddr.ip, c.laddr.port) for c in found}


def test_a_receiver_that_does_not_come_to_the_broadcast_says_why(tmp_path):
    sender = link_of("gloo", tmp_path).open_sender()
    sender.begin(0)

    def deliver(update):
        raise WeightSyncError("the engine has no room")

    begin = time.monotonic()
    with pytest.raises(WeightSyncError, match="the engine has no room"):
        sender.send([("w", torch.zeros(8))], deliver)
    assert time.monotonic() - begin < 60
    sender.end()


@pytest.mark.parametrize("name", ON_CPU)
def test_an_engine_loads_every_bucket_in_the_thread_of_the_sync(name, tmp_path):
    """What one allocates and frees in a thread of its own is kept for that thread: with one for
    each bucket that came to the whole model."""
    link = link_of(name, tmp_path)
    sender, receiver = link.open_sender(), link.open_receiver()
    loading = []

    def deliver(update):
        receiver.receive(update, lambda tensors: loading.append(threading.get_ident()))

    sender.begin(0)
    receiver.begin(0)
    for _ in range(3):
        sender.send([("w", torch.zeros(8))], deliver)
    assert loading == [threading.get_ident()] * 3
    receiver.end()
    sender.end()


def test_a_broadcast_that_no_receiver_took_is_an_error_as_soon_as_delivery_is_over(tmp_path):
    sender = link_of("gloo", tmp_path).open_sender()
    sender.begin(0)
    begin = time.monotonic()
    with pytest.raises(WeightSyncError, match="receivers do not come to a broadcast"):
        sender.send([("w", torch.zeros(8))], lambda update: None)
    assert time.monotonic() - begin < 60  # half of the deadline
    sender.end()
