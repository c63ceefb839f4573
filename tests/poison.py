"""Pickles that would make a folder, for tests that read what a stranger wrote."""

import dataclasses
import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from mcore_rl.checkpoint_metadata import METADATA_FILE, read_metadata


class MakesFolder:
    """Makes a folder when it is unpickled by a reader that calls whatever it is told to call.

    Args:
        folder: to be made.
        **attributes: that it passes for something with, where it is written.
    """

    def __init__(self, folder: Path, **attributes):
        self._folder = str(folder)
        vars(self).update(attributes)

    def __reduce__(self):
        return os.mkdir, (self._folder,)


def in_front_of(good: bytes, folder: Path) -> bytes:
    """Return a pickle that makes `folder` and then is the good one, as if nothing had happened."""
    call = pickletools.optimize(pickle.dumps(MakesFolder(folder), protocol=4))  # remembers nothing
    assert call.endswith(pickle.STOP)
    return call.removesuffix(pickle.STOP) + pickle.POP + good


def put_in_place_of(checkpoint: Path, index: MetadataIndex, folder: Path) -> None:
    """Have a part of a distributed checkpoint make `folder` when it is loaded; all else stays."""
    metadata, content = read_metadata(checkpoint), io.BytesIO()
    torch.save(MakesFolder(folder), content)
    place = metadata.storage_data[index]
    with (checkpoint / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(content.getvalue())
    metadata.storage_data[index] = dataclasses.replace(place, length=len(content.getvalue()))
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))


def call_object(checkpoint: Path, key: str) -> None:
    """Have `.metadata` say that a tensor in one piece is an object, which has a size too."""
    metadata: Any = read_metadata(checkpoint)
    size = metadata.state_dict_metadata[key].size
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.state_dict_metadata[key].size = size
    (index,) = (index for index in metadata.storage_data if index.fqn == key)
    metadata.storage_data[MetadataIndex(key)] = metadata.storage_data.pop(index)
    (checkpoint / METADATA_FILE).write_bytes(pickle.dumps(metadata))
