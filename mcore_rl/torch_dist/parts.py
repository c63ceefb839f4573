"""Parts of files: tensors in memory, and bytes of another file that need no change.

Bytes of a file go from file to file within the kernel, which is several times faster than reading
them into fresh memory and writing them. So what is neither cast nor cut across its rows stays a
`FileSpan`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from mcore_rl.errors import UserError

_NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of a file system that cannot send its files within the kernel."""

_READ_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FileSpan:
    """Bytes `start` to `start + nbytes` of an open file."""

    file: Path
    descriptor: int
    start: int
    nbytes: int

    def part(self, start: int, nbytes: int) -> FileSpan:
        """Return bytes `start` to `start + nbytes` of this span."""
        assert 0 <= start <= start + nbytes <= self.nbytes, (self, start, nbytes)
        return FileSpan(self.file, self.descriptor, self.start + start, nbytes)

    def read(self, into: memoryview) -> None:
        """Fill a buffer of `nbytes`.

        Raises:
            UserError: if the file ends before.
        """
        done = 0
        while done < self.nbytes:  # one call reads 2 GiB at most
            count = os.preadv(self.descriptor, [into[done:]], self.start + done)
            self._require_some(count)
            done += count

    def append_to(self, stream: BinaryIO) -> None:
        """Append the bytes to a file.

        Raises:
            UserError: if the file ends before.
        """
        done = 0
        while done < self.nbytes:
            stream.flush()  # what follows goes past its buffer
            try:
                count = os.sendfile(
                    stream.fileno(), self.descriptor, self.start + done, self.nbytes - done
                )
            except OSError as error:
                if error.errno not in _NOT_OFFERED:
                    raise
                size = min(_READ_BYTES, self.nbytes - done)
                count = stream.write(os.pread(self.descriptor, size, self.start + done))
            self._require_some(count)
            done += count

    def _require_some(self, count: int) -> None:
        if count == 0:
            raise UserError(f"{self.file} was cut short while it was read.")


Part: TypeAlias = Tensor | FileSpan
"""Some of the numbers of a tensor, row by row, in the dtype in which they are written."""


def append(stream: BinaryIO, part: Part) -> int:
    """Append a part to a file and return its number of bytes."""
    if isinstance(part, FileSpan):
        part.append_to(stream)
        return part.nbytes
    return stream.write(bytes_of(part))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, row by row; shared where it is contiguous."""
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU, to be written to while there is the
    tensor. No numpy array: one would forbid for good that its storage is resized, and so offload.
    """
    assert tensor.is_contiguous() and tensor.device.type == "cpu", tensor.shape
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))
