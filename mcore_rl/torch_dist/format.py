"""Megatron's `torch_dist` checkpoints: what is in their files, byte by byte.

The format is that of torch.distributed.checkpoint: `.metadata` lists, for the tensor of each key,
rectangles that cover it, and for each rectangle the file and the bytes in it, which are what
torch.save wrote. Around it Megatron wants `metadata.json` and `common.pt`
(megatron/core/dist_checkpointing/core.py, strategies/common.py). Readers take any rectangles, so a
tensor written in pieces loads in every layout.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mcore_rl.models.mappings import Shape
from mcore_rl.torch_dist.parts import Part, append

FORMAT_FILE = "metadata.json"
COMMON_FILE = "common.pt"
STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
}
# What reading an archive or a pickle with wrong bytes in it raises.


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of the tensor of one key."""

    key: str
    offsets: Shape
    sizes: Shape
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Location:
    """Where something is stored."""

    file: str
    offset: int
    length: int


def write_tensor(stream: BinaryIO, shape: Shape, dtype: torch.dtype, parts: Iterable[Part]) -> None:
    """Write what torch.save writes for a tensor, without having it in one piece.

    Args:
        stream: to append to.
        shape: of the tensor.
        dtype: of the tensor and its parts.
        parts: the tensor row by row; together as many numbers as it has.
    """
    before, after = _around_the_numbers(shape, dtype)
    stream.write(before)
    num_bytes = 0
    for part in parts:
        num_bytes += append(stream, part)
    assert num_bytes == torch.Size(shape).numel() * dtype.itemsize, (shape, dtype, num_bytes)
    stream.write(after)


def saved_tensor_length(shape: Shape, dtype: torch.dtype) -> int:
    """Return the number of bytes that `write_tensor` writes."""
    before, after = _around_the_numbers(shape, dtype)
    return len(before) + torch.Size(shape).numel() * dtype.itemsize + len(after)


def metadata_bytes(
    shapes: dict[str, Shape],
    pieces: list[tuple[Piece, Location]],
    objects: dict[str, Location],
) -> bytes:
    """Return what `.metadata` holds.

    Args:
        shapes: full shape of the tensor of each key.
        pieces: cover these tensors, each number once.
        objects: key of each stored object that is no tensor.
    """
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for piece, location in pieces:
        if piece.key not in tensors:
            properties = TensorProperties(dtype=piece.dtype)
            tensors[piece.key] = TensorStorageMetadata(
                properties, torch.Size(shapes[piece.key]), []
            )
        stored = tensors[piece.key]
        assert isinstance(stored, TensorStorageMetadata)
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
        stored.chunks.append(chunk)
        storage[MetadataIndex(piece.key, chunk.offsets)] = _info(location)
    for key, location in objects.items():
        tensors[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _info(location)
    return pickle.dumps(Metadata(tensors, planner_data={}, storage_data=storage))


def format_bytes() -> bytes:
    """Return what `metadata.json` holds; Megatron takes a folder with it for a whole checkpoint."""
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    return json.dumps(backends | {f"{key}_version": 1 for key in backends}).encode()


def saved_bytes(value: object) -> bytes:
    """Return what torch.save writes for a small value."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@functools.lru_cache(maxsize=64)
def _around_the_numbers(shape: Shape, dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return what torch.save writes before and after the numbers of a tensor.

    A file of torch.save is a zip archive with the numbers, uncompressed, in "data/0". Beside names
    and sizes it has their checksum, which no version of torch compares; it is that of zeros here,
    as it is left out where torch.serialization.set_crc32_options(False) is set.
    """
    archive = saved_bytes(torch.zeros(shape, dtype=dtype))
    layout, start = find_numbers(io.BytesIO(archive))
    return archive[:start], archive[start + layout.nbytes :]


class NoTensorError(pickle.UnpicklingError):
    """A pickle asks for something that no tensor needs."""


def find_numbers(stream: IO[bytes]) -> tuple[Tensor, int]:
    """Return the layout of a tensor that torch.save wrote, on the meta device, and where in the
    archive the numbers of its storage begin. Reads everything but these."""
    with zipfile.ZipFile(stream) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        layout, key = _TensorPickle(io.BytesIO(archive.read(pickled))).load()
        entry = archive.getinfo(f"{pickled.removesuffix('.pkl')}/{key}")
    stream.seek(entry.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    start = entry.header_offset + 30 + name_length + extra_length
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != storage_bytes(layout):
        raise zipfile.BadZipFile(f"{entry.filename} is not {storage_bytes(layout)} bytes")
    return layout, start


def storage_bytes(layout: Tensor) -> int:
    return layout.untyped_storage().nbytes()


class _TensorPickle(pickle.Unpickler):
    """Reads what torch.save pickles of a tensor beside its numbers, and nothing else: `load`
    returns its layout on the meta device and the name of its storage.

    torch.load under FakeTensorMode does the same in ten times the time, which counts where a
    checkpoint has a rectangle per expert.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._layout
        if (module, name) == ("collections", "OrderedDict"):  # the tensor's hooks: none
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise NoTensorError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[Tensor, str]:
        _, dtype, key, _, num_elements = pid
        return torch.empty(num_elements, dtype=dtype, device="meta"), key

    @staticmethod
    def _layout(
        storage: tuple[Tensor, str], offset: int, size: Shape, stride: Shape, *_: Any
    ) -> tuple[Tensor, str]:
        numbers, key = storage
        return numbers.as_strided(size, stride, offset), key


def _info(location: Location) -> _StorageInfo:
    return _StorageInfo(location.file, location.offset, location.length)
