"""Safetensors files piece by piece: read by plain reads, written without holding a tensor.

`CheckpointReader` maps files into memory, and the pages it touches count as the process's own until
the file is closed. Here nothing stays: a piece is read into memory of its own.

Format: 8 bytes, the length of the header (little endian); the header, JSON; the numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mcore_rl.errors import require
from mcore_rl.foreign_json import parse_json
from mcore_rl.models.mappings import Range, Shape
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.torch_dist.parts import FileSpan, bytes_of

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Safetensors' names of the dtypes that can be converted."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def on_meta(self) -> Tensor:
        """Return a tensor of this shape and dtype without numbers."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class SafetensorsSource:
    """Slices of the tensors of a Hugging Face folder.

    Args:
        reader: has found the tensors and checked their files.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self._headers: dict[Path, tuple[int, dict[str, dict], int]] = {}

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor.

        Raises:
            UserError: if it is not one that can be converted.
        """
        _, header, _ = self._open(self._reader.file(name))
        dtype = header[name]["dtype"]
        rule = f"is not one of {', '.join(DTYPES)}"
        require(dtype in DTYPES, f"checkpoint {self._reader.folder}: dtype of {name}", dtype, rule)
        return DTYPES[dtype]

    def span(self, name: str, rows: Range | None = None) -> FileSpan:
        """Return where `tensor[rows]` lies, None meaning all."""
        file = self._reader.file(name)
        descriptor, header, data_start = self._open(file)
        shape = header[name]["shape"]
        first, last = rows or (0, shape[0])
        row_bytes = torch.Size(shape[1:]).numel() * self.dtype(name).itemsize
        start = data_start + header[name]["data_offsets"][0] + first * row_bytes
        return FileSpan(file, descriptor, start, (last - first) * row_bytes)

    def read(self, name: str, rows: Range | None = None) -> Tensor:
        """Return `tensor[rows]`, None meaning all, in memory of its own."""
        shape = self._reader.shape(name)
        first, last = rows or (0, shape[0])
        tensor = torch.empty((last - first, *shape[1:]), dtype=self.dtype(name))
        self.span(name, rows).read(bytes_of(tensor))
        return tensor

    def close(self) -> None:
        """Close the files."""
        for descriptor, _, _ in self._headers.values():
            os.close(descriptor)
        self._headers.clear()

    def _open(self, file: Path) -> tuple[int, dict[str, dict], int]:
        if file not in self._headers:
            descriptor = os.open(file, os.O_RDONLY)
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            header = parse_json(os.pread(descriptor, length, 8))
            self._headers[file] = descriptor, header, 8 + length
        return self._headers[file]


def write_header(stream: BinaryIO, tensors: Sequence[TensorInfo]) -> None:
    """Write the header of a file whose tensors follow it in this order, without gaps."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
