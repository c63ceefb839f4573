"""The transport `shared_memory`: through memory that the processes of a machine share.

The sender has two slots, files in /dev/shm as large as the largest bucket so far, and writes each
bucket into a free one. A slot is free again when every receiver has released the tensors that it
made in it. An engine releases them when it has loaded them, at the latest with the whole layer; one
byte per receiver at the head of the slot records this. While one slot is held, receivers copy the
data of the other, so there is always a free one. So at most two buckets are shared, most are loaded
without a copy, and none changes while an engine keeps it.

A file has a random name, only this user can open it, and it is unlinked when the receivers have
opened it: it vanishes with the processes that have it mapped, however they end. A process killed
before that leaves a file that no process has locked; the next sender of this user removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mcore_rl.errors import WeightSyncError
from mcore_rl.lazy_torch import torch
from mcore_rl.weight_sync.base import (
    TRANSPORTS,
    Deliver,
    Distance,
    Link,
    Load,
    NamedTensors,
    Receiver,
    Sender,
    Transport,
)
from mcore_rl.weight_sync.packing import PackedBucket

FOLDER = Path("/dev/shm")
PREFIX = "mcore_rl_weights_"
_HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class InSlot:
    """A bucket that lies in a slot."""

    slot: str
    """Name of the file."""
    slots: tuple[str, ...]
    """All that the sender has."""
    bucket: PackedBucket
    must_copy: bool
    """Whether the receivers must release the slot before they answer."""


class _Slot:
    """The sender's side of a slot."""

    def __init__(self, num_bytes: int, num_receivers: int) -> None:
        self.name = f"{PREFIX}{secrets.token_hex(16)}"
        self.num_bytes = num_bytes
        self._has_name = False
        # Without a name until it is locked, or another sender could take it for a leftover.
        self._file = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            os.posix_fallocate(self._file, 0, _HEAD_BYTES + num_bytes)  # or a write would kill us
            memory = mmap.mmap(self._file, _HEAD_BYTES + num_bytes)
            # Any src_dir_fd: without one Python does not follow the symbolic link.
            of_file = f"/proc/self/fd/{self._file}"
            os.link(of_file, FOLDER / self.name, src_dir_fd=self._file, follow_symlinks=True)
            self._has_name = True
        except OSError as error:
            os.close(self._file)
            if error.errno != errno.ENOSPC:
                raise
            free = os.statvfs(FOLDER).f_bavail * os.statvfs(FOLDER).f_frsize
            raise WeightSyncError(
                f"{FOLDER} has {free >> 20} MiB left, a bucket of weights takes {num_bytes >> 20}: "
                "enlarge it, or lower rollout.update_weights_bucket_mib",
                role="rollout",
            ) from error
        self._released = np.frombuffer(memory, np.uint8, num_receivers)
        self._released[:] = 1
        self.buffer = torch.from_numpy(np.frombuffer(memory, np.uint8, num_bytes, _HEAD_BYTES))

    @property
    def is_free(self) -> bool:
        return bool(self._released.all())

    def take(self) -> None:
        """Hold the slot until every receiver releases it."""
        self._released[:] = 0

    def drop_name(self) -> None:
        """Unlink the file; every receiver has opened it."""
        if self._has_name:
            (FOLDER / self.name).unlink()
            self._has_name = False

    def close(self) -> None:
        self.drop_name()
        os.close(self._file)


class SharedMemorySender(Sender[InSlot]):
    """Writes buckets into slots."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        remove_leftovers()
        self._slots: list[_Slot] = []

    def send(self, bucket: NamedTensors, deliver: Deliver[InSlot]) -> None:
        packed = PackedBucket.of(bucket)
        slot, must_copy = self._free_slot(packed.num_bytes)
        packed.write(bucket, slot.buffer)
        slot.take()
        names = tuple(other.name for other in self._slots)
        deliver(InSlot(slot.name, names, packed, must_copy))
        slot.drop_name()

    def _free_slot(self, num_bytes: int) -> tuple[_Slot, bool]:
        free = [slot for slot in self._slots if slot.is_free]
        must_copy = len(free) < len(self._slots)
        for slot in free:
            if slot.num_bytes >= num_bytes:
                return slot, must_copy
            self._slots.remove(slot)
            slot.close()
        assert len(self._slots) < 2, "a receiver holds what it was told to copy"
        self._slots.append(_Slot(num_bytes, self.link.num_receivers))
        return self._slots[-1], must_copy

    def end(self) -> None:
        for slot in self._slots:
            slot.close()
        self._slots = []


class SharedMemoryReceiver(Receiver[InSlot]):
    """Makes tensors in the slots."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self._mapped: dict[str, mmap.mmap] = {}

    def receive(self, update: InSlot, load: Load) -> None:
        self._mapped = {n: memory for n, memory in self._mapped.items() if n in update.slots}
        if update.slot not in self._mapped:
            with open(FOLDER / update.slot, "r+b") as file:
                self._mapped[update.slot] = mmap.mmap(file.fileno(), 0)
        load(self._tensors(self._mapped[update.slot], update))

    def _tensors(self, memory: mmap.mmap, update: InSlot) -> NamedTensors:
        num_bytes = update.bucket.num_bytes
        array = np.frombuffer(memory, np.uint8, num_bytes, _HEAD_BYTES)
        released = np.frombuffer(memory, np.uint8, self.link.num_receivers)
        # Every tensor over the array keeps it alive.
        weakref.finalize(array, _let_go, released, self.link.receiver).atexit = False
        tensors = update.bucket.read(torch.from_numpy(array))
        if update.must_copy:
            return [(name, tensor.clone()) for name, tensor in tensors]
        return tensors

    def end(self) -> None:
        self._mapped = {}


def _let_go(released: np.ndarray, receiver: int) -> None:
    released[receiver] = 1


def remove_leftovers() -> None:
    """Remove slots of this user whose process is gone."""
    for file in FOLDER.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # not this user's, in use, or already removed
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.unlink()
            finally:
                os.close(descriptor)


TRANSPORTS.add(
    "shared_memory",
    Transport(
        sender=SharedMemorySender,
        receiver=SharedMemoryReceiver,
        reaches=frozenset({Distance.SAME_PROCESS, Distance.SAME_MACHINE}),
        update=InSlot,
    ),
)
