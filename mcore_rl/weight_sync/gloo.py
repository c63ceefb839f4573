"""The transport `gloo`: broadcast over TCP, from a train worker to the processes of an engine.

Sender and receivers make a group of their own, apart from every default group, when the first
update of a sync brings the receivers its address, and leave it at the end. The sender broadcasts
when all receivers have reported that they are ready, so that none waits for one that failed. A
bucket is one broadcast of bytes: the sender has a second copy, and every receiver has one for as
long as the engine keeps it. Every wait has a deadline. The group listens on one address of the
sender's machine, `Link.address`, without a key: use it only in a private network of the cluster.
"""

from __future__ import annotations

import datetime
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import WeightSyncError
from mcore_rl.lazy_torch import torch
from mcore_rl.sockets import address_towards
from mcore_rl.stores import serve_store
from mcore_rl.weight_sync.base import (
    TRANSPORTS,
    Deliver,
    Distance,
    Load,
    NamedTensors,
    Receiver,
    Sender,
    Transport,
)
from mcore_rl.weight_sync.packing import PackedBucket

DEADLINE = datetime.timedelta(seconds=120)
"""For a rendezvous and for a broadcast: after it, the other end counts as gone."""
_PAUSE_S = 0.0005


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A bucket that comes by broadcast."""

    number: int
    """Number of the bucket in the sync, from 0."""
    bucket: PackedBucket
    address: str
    """Address of the store for the rendezvous of the group."""
    port: int


class GlooSender(Sender[Broadcast]):
    """Rank 0 of the group."""

    _store: Any = None
    _group: Any = None

    def begin(self, version: int) -> None:
        self._store, self._num_sent = serve_store(self.link.address, DEADLINE), 0

    def send(self, bucket: NamedTensors, deliver: Deliver[Broadcast]) -> None:
        packed = PackedBucket.of(bucket)
        update = Broadcast(self._num_sent, packed, self.link.address, self._store.port)
        self._num_sent += 1
        buffer = torch.empty(packed.num_bytes, dtype=torch.uint8)
        packed.write(bucket, buffer)
        # The engine may be in this process and must work in one thread: each thread keeps its own
        # allocator cache and its own pool for torch's operators.
        pool, is_over = ThreadPoolExecutor(1), threading.Event()
        broadcasting = pool.submit(self._broadcast, self._store, update.number, buffer, is_over)
        try:
            deliver(update)
        finally:
            is_over.set()
            pool.shutdown(wait=False)
        broadcasting.result()

    def _broadcast(
        self, store: Any, number: int, buffer: torch.Tensor, is_over: threading.Event
    ) -> None:
        """Send a buffer when all receivers are ready for it, unless the delivery ends first."""
        keys = [_key(number, receiver) for receiver in range(self.link.num_receivers)]
        last = time.monotonic() + DEADLINE.total_seconds()
        try:
            while True:
                was_over = is_over.is_set() or time.monotonic() > last
                if store.check(keys):
                    break
                if was_over:
                    raise WeightSyncError("receivers do not come to a broadcast", role="rollout")
                is_over.wait(_PAUSE_S)
            if self._group is None:
                size = 1 + self.link.num_receivers
                self._group = _join(store, self.link.address, rank=0, size=size)
            _broadcast(self._group, buffer)
            return
        except RuntimeError as error:
            problem = str(error)  # only the text: the error would keep the group
        self._group = None  # receivers stop waiting
        raise WeightSyncError(f"a broadcast broke off: {problem}", role="rollout")

    def end(self) -> None:
        self._group = self._store = None


class GlooReceiver(Receiver[Broadcast]):
    """Another rank of the group."""

    _store: Any = None
    _group: Any = None

    def receive(self, update: Broadcast, load: Load) -> None:
        number = self.link.receiver
        if self._store is None:
            distributed: Any = torch.distributed
            self._store = distributed.TCPStore(
                update.address, update.port, is_master=False, timeout=DEADLINE
            )
        self._store.set(_key(update.number, number), "")
        if self._group is None:
            own_address = address_towards(update.address, update.port)
            size = 1 + self.link.num_receivers
            self._group = _join(self._store, own_address, rank=1 + number, size=size)
        buffer = torch.empty(update.bucket.num_bytes, dtype=torch.uint8)
        _broadcast(self._group, buffer)
        load(update.bucket.read(buffer))

    def end(self) -> None:
        self._group = self._store = None


def _key(number: int, receiver: int) -> str:
    return f"broadcast {number} receiver {receiver}"


def _join(store: Any, address: str, rank: int, size: int) -> Any:
    gloo: Any = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = DEADLINE
    options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, size, options)


def _broadcast(group: Any, buffer: torch.Tensor) -> None:
    if buffer.numel():
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.timeout = 0, DEADLINE
        group.broadcast([buffer], options).wait()


TRANSPORTS.add(
    "gloo",
    Transport(
        sender=GlooSender, receiver=GlooReceiver, reaches=frozenset(Distance), update=Broadcast
    ),
)
