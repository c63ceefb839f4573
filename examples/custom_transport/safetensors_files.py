"""A weight transport of one's own: through safetensors files in the folder of the run.

Importing the module registers the transport; `MCORE_RL_PLUGINS` has every process import it. It
reaches an engine anywhere the run folder does. Loading maps a file into memory; what an engine
keeps of it stays valid until the engine lets go.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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


@dataclass(frozen=True, slots=True)
class WeightFile:
    """What travels to the engine in place of the tensors."""

    path: str


class FileSender(Sender[WeightFile]):
    """Writes a file for each bucket and removes all of them at the end of a sync."""

    def begin(self, version: int) -> None:
        name = f"weights_{version}_engine_{self.link.engine}_rank_{self.link.engine_rank}"
        self._folder = Path(self.link.run_folder) / name
        self._folder.mkdir(exist_ok=True)  # a run that was killed may have left it
        self._num_sent = 0

    def send(self, bucket: NamedTensors, deliver: Deliver[WeightFile]) -> None:
        path = self._folder / f"{self._num_sent}.safetensors"
        # Parts of one gathered buffer share their memory, which the format refuses.
        whole = torch.contiguous_format
        save_file({name: x.detach().clone(memory_format=whole) for name, x in bucket}, path)
        deliver(WeightFile(str(path)))
        self._num_sent += 1

    def end(self) -> None:
        shutil.rmtree(self._folder)


class FileReceiver(Receiver[WeightFile]):
    """Loads what is in a file."""

    def receive(self, update: WeightFile, load: Load) -> None:
        load(list(load_file(update.path).items()))


TRANSPORTS.add(
    "safetensors_files",
    Transport(sender=FileSender, receiver=FileReceiver, reaches=frozenset(Distance)),
)
