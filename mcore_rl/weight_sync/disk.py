"""The transport `disk`: through safetensors files in the folder of the run.

It reaches every engine that can read the folder. Each bucket is a file, and all files stay until
the end of the sync: an engine may keep the mapped memory, and over a network a removed file is lost
for a process that maps it. Nothing is flushed to the disk: after a power failure it is sent again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True, slots=True)
class InFile:
    """A bucket that lies in a file."""

    path: str


class DiskSender(Sender[InFile]):
    """Writes a file for each bucket and removes all of them at the end of a sync."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        name = f"weights_of_engine_{link.engine}_rank_{link.engine_rank}"
        self._folder = Path(link.run_folder) / name
        self._remove()  # a killed run may have left it

    def begin(self, version: int) -> None:
        self._folder.mkdir()
        self._num_sent = 0

    def send(self, bucket: NamedTensors, deliver: Deliver[InFile]) -> None:
        from safetensors.torch import save_file

        path = self._folder / f"{self._num_sent}.safetensors"
        whole = torch.contiguous_format  # the format refuses tensors that share their memory
        save_file({name: x.detach().clone(memory_format=whole) for name, x in bucket}, path)
        self._num_sent += 1
        deliver(InFile(str(path)))

    def end(self) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._folder.exists():
            shutil.rmtree(self._folder)


class DiskReceiver(Receiver[InFile]):
    """Loads what is in a file, mapped into memory."""

    def receive(self, update: InFile, load: Load) -> None:
        from safetensors.torch import load_file

        load(list(load_file(update.path).items()))


TRANSPORTS.add(
    "disk",
    Transport(sender=DiskSender, receiver=DiskReceiver, reaches=frozenset(Distance), update=InFile),
)
