"""Reads Megatron's `torch_dist` checkpoints piece by piece, without a model or processes."""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from mcore_rl.checkpoint_metadata import METADATA_FILE, read_metadata, refusal
from mcore_rl.errors import UserError, require
from mcore_rl.models.mappings import Range, Shape
from mcore_rl.torch_dist.format import (
    COMMON_FILE,
    FORMAT_FILE,
    STORAGES,
    NoTensorError,
    find_numbers,
    storage_bytes,
)
from mcore_rl.torch_dist.parts import FileSpan, bytes_of, memory_of

_CACHE_BYTES = 64 * 2**20
_DAMAGE = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, struct.error, EOFError),
    *(AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError),
)


_ASKED_FOR = re.compile(r"GLOBAL (\S+)")


def read_common(folder: Path) -> Any:
    """Return what a checkpoint has beside tensors, `common.pt`.

    Raises:
        UserError: if it is more than dictionaries, lists and numbers.
    """
    file = folder / COMMON_FILE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch advises to read the file nevertheless.
        asked_for = _ASKED_FOR.search(str(error))
        what = (
            f"it asks for {asked_for[1]}"
            if asked_for
            else "it is damaged, or no file of torch.save"
        )
        raise refusal(file, what) from error


@dataclass(frozen=True, slots=True)
class _Stored:
    """One rectangle as torch.save wrote it."""

    layout: Tensor
    """On the meta device: shape, strides and offset in what `numbers` holds."""
    numbers: FileSpan


class TorchDistSource:
    """Rectangles of the tensors of a distributed checkpoint, whoever wrote it, in any layout.

    Memory is that of the rectangles stored there: the last ones read stay, 64 MiB or one of them.

    Raises:
        UserError: if the folder is not a whole checkpoint, or its `.metadata` would have code run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        key, fix = "checkpoint", "Give a folder that training or hf-to-mcore wrote."
        for name in (FORMAT_FILE, METADATA_FILE):
            require((self.folder / name).is_file(), key, str(folder), f"has no {name}", fix)
        self._metadata = read_metadata(self.folder)
        self._check_files()
        self._streams: dict[str, BinaryIO] = {}
        self._sorted: dict[str, tuple[list[int], int, list[ChunkStorageMetadata]]] = {}
        self._stored: dict[MetadataIndex, _Stored] = {}
        self._cache: OrderedDict[MetadataIndex, Tensor] = OrderedDict()

    def tensor_keys(self) -> list[str]:
        """Return the keys of all tensors, sorted."""
        return self._keys_of(TensorStorageMetadata)

    def object_keys(self) -> list[str]:
        """Return the keys of everything that is not a tensor, sorted."""
        return self._keys_of(BytesStorageMetadata)

    def shape(self, key: str) -> Shape:
        """Return the full shape of a tensor."""
        return tuple(self._tensor(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor.

        Raises:
            UserError: if it is not one that can be converted.
        """
        dtype = self._tensor(key).properties.dtype
        rule = f"is not one of {', '.join(map(str, STORAGES.values()))}"
        known = dtype in STORAGES.values()
        require(known, f"checkpoint {self.folder}: dtype of {key}", dtype, rule)
        return dtype

    def span(self, key: str, offsets: Shape, sizes: Shape) -> FileSpan | None:
        """Return where the rectangle of that size at those offsets lies in a file, row by row; None
        where it does not lie in one piece."""
        for chunk, overlap in self._overlapping(key, offsets, sizes):
            stored = self._find(MetadataIndex(key, chunk.offsets))
            part = stored.layout[_slices(overlap, chunk.offsets)]
            if part.shape == torch.Size(sizes) and part.is_contiguous():
                return _numbers_of(stored, part)
            return None
        return None

    def read(self, key: str, offsets: Shape, sizes: Shape) -> Tensor:
        """Return the rectangle of that size at those offsets; do not write to it.

        Raises:
            UserError: if there is no such tensor, or its pieces do not cover the rectangle.
        """
        result, covered = None, 0
        for chunk, overlap in self._overlapping(key, offsets, sizes):
            stored = self._load(MetadataIndex(key, chunk.offsets))
            part = stored[_slices(overlap, chunk.offsets)]
            if part.shape == torch.Size(sizes):
                return part
            if result is None:
                result = part.new_empty(sizes)
            result[_slices(overlap, offsets)] = part
            covered += part.numel()
        if result is None or covered != result.numel():
            raise UserError(f"checkpoint {self.folder}: pieces of {key!r} are missing.")
        return result

    @torch.no_grad()
    def read_into(self, key: str, offsets: Shape, target: Tensor) -> None:
        """Fill a tensor of any device and dtype with the rectangle of its size at those offsets.

        What lies in one piece in a file and in memory is read without a copy. Numbers beyond the
        shape of the stored tensor are 0.

        Raises:
            UserError: if there is no such tensor, or its pieces do not cover the rectangle.
        """
        places = zip(offsets, target.shape, self.shape(key), strict=True)
        wanted = math.prod(max(min(length, end - at), 0) for at, length, end in places)
        if wanted < target.numel():
            target.zero_()
        for chunk, overlap in self._overlapping(key, offsets, tuple(target.shape)):
            index = MetadataIndex(key, chunk.offsets)
            stored = self._find(index)
            part = stored.layout[_slices(overlap, chunk.offsets)]
            place = target[_slices(overlap, offsets)]
            if not part.is_contiguous():
                place.copy_(self._load(index)[_slices(overlap, chunk.offsets)])
            elif place.device.type == "cpu" and place.dtype == part.dtype and place.is_contiguous():
                _numbers_of(stored, part).read(memory_of(place))
            else:
                numbers = torch.empty(part.shape, dtype=part.dtype)
                _numbers_of(stored, part).read(bytes_of(numbers))
                place.copy_(numbers)
            wanted -= part.numel()
        if wanted:
            raise UserError(f"checkpoint {self.folder}: pieces of {key!r} are missing.")

    def close(self) -> None:
        """Close the files and drop what was read."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._stored.clear()
        self._cache.clear()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            end = info.offset + info.length
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), end)
        for name, end in sorted(ends.items()):
            file = self.folder / name
            require(file.is_file(), "checkpoint", str(self.folder), f"lacks its file {name}")
            if file.stat().st_size < end:
                raise UserError(f"{file} is cut short: it must have at least {end} bytes.")

    def _keys_of(self, kind: type) -> list[str]:
        found = self._metadata.state_dict_metadata.items()
        return sorted(key for key, what in found if isinstance(what, kind))

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found = self._metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise UserError(
                f"checkpoint {self.folder} has no tensor {key!r}. "
                "It is of another model than the configuration, or not one of Megatron's GPT model."
            )
        return found

    def _overlapping(
        self, key: str, offsets: Shape, sizes: Shape
    ) -> Iterator[tuple[ChunkStorageMetadata, list[Range]]]:
        """Yield the stored rectangles that have numbers of the one asked for, each with what both
        have, as a range in each dimension."""
        for chunk in self._near(key, offsets[0], offsets[0] + sizes[0]):
            overlap = [
                (max(start, at), min(start + size, at + length))
                for start, size, at, length in zip(
                    offsets, sizes, chunk.offsets, chunk.sizes, strict=True
                )
            ]
            if all(first < last for first, last in overlap):
                yield chunk, overlap

    def _near(self, key: str, first: int, last: int) -> list[ChunkStorageMetadata]:
        """Return the stored rectangles of a key that may have rows `first` to `last`.

        A key that stacks the experts of all layers has thousands.
        """
        if key not in self._sorted:
            chunks = sorted(self._tensor(key).chunks, key=lambda chunk: chunk.offsets)
            longest = max(chunk.sizes[0] for chunk in chunks)
            self._sorted[key] = [chunk.offsets[0] for chunk in chunks], longest, chunks
        starts, longest, chunks = self._sorted[key]
        return chunks[bisect_right(starts, first - longest) : bisect_left(starts, last)]

    def _find(self, index: MetadataIndex) -> _Stored:
        if index in self._stored:
            return self._stored[index]
        info = self._metadata.storage_data[index]
        file = self.folder / info.relative_path
        if info.relative_path not in self._streams:
            self._streams[info.relative_path] = file.open("rb")
        stream = self._streams[info.relative_path]
        part: Any = _FilePart(stream, info.offset, info.length)
        try:
            layout, start = find_numbers(part)
        except NoTensorError as error:
            raise refusal(file, f"it asks for {error}") from error
        except _DAMAGE as error:
            raise UserError(f"{file} is damaged at byte {info.offset}.") from error
        # Bytes are copied as the metadata describes them.
        if layout.dtype != self.dtype(index.fqn) or start + storage_bytes(layout) > info.length:
            raise UserError(f"{file} does not hold {index.fqn!r} at byte {info.offset}.")
        archive = FileSpan(file, stream.fileno(), info.offset, info.length)
        numbers = archive.part(start, storage_bytes(layout))
        self._stored[index] = _Stored(layout, numbers)
        return self._stored[index]

    def _load(self, index: MetadataIndex) -> Tensor:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        stored = self._find(index)
        num_kept = sum(tensor.nbytes for tensor in self._cache.values())
        while self._cache and num_kept + stored.numbers.nbytes > _CACHE_BYTES:
            num_kept -= self._cache.popitem(last=False)[1].nbytes
        layout = stored.layout
        numbers = torch.empty(stored.numbers.nbytes // layout.itemsize, dtype=layout.dtype)
        stored.numbers.read(bytes_of(numbers))
        self._cache[index] = numbers.as_strided(
            layout.shape, layout.stride(), layout.storage_offset()
        )
        return self._cache[index]


def _numbers_of(stored: _Stored, part: Tensor) -> FileSpan:
    """Return where the numbers of a contiguous part of the layout are."""
    return stored.numbers.part(int(part.storage_offset()) * part.itemsize, part.nbytes)


def _slices(bounds: list[tuple[int, int]], origin: Shape) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for (a, b), o in zip(bounds, origin, strict=True))


class _FilePart(io.RawIOBase):
    """Bytes `start` to `start + length` of a file as a file, which is what zipfile wants."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: self._length - self._at]
        self._stream.seek(self._start + self._at)
        count = self._stream.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
        self._at += count
        return count
