"""Digests of weights: they show whether the weights that arrived are those that were sent.

The cheap form, taken of every tensor at both ends of every sync: one integer over the bits of a
tensor, kept with its name, type and shape. The bits are read in the order of the tensor's indices,
whatever its strides, as 64-bit words in rows of 64, zeros behind the last:

    content = sum_r weight_r * (sum_c word_rc)   mod 2^64,   weight_r odd, pseudo-random

Detected: any change of a single word, a lost or doubled tensor, exchanged experts (the names
differ), swapped or shifted rows, a transposed matrix. Not detected: words exchanged within a row
(512 bytes), changes within a row that cancel, and, with a probability of about 2^-32, others. It is
not a cryptographic hash: it finds errors, not forgeries.

The full form is `full_digest`, blake3 over the same bits: 5 times as slow, so on request only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mcore_rl.foreign_json import parse_json

_WORDS_PER_ROW = 64
_BYTES_PER_ROW = 8 * _WORDS_PER_ROW


@dataclass(frozen=True, slots=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    content: int


class Manifest:
    """Names, types, shapes and contents of the tensors of a sync; grows bucket by bucket."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._doubled: list[str] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Add tensors; a name that comes a second time is recorded as doubled."""
        named_tensors = list(named_tensors)
        contents = _contents([tensor for _, tensor in named_tensors])
        for (name, tensor), content in zip(named_tensors, contents, strict=True):
            if name in self._entries:
                self._doubled.append(name)
            self._entries[name] = _Entry(
                str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), content
            )

    @contextlib.contextmanager
    def adding(self, named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        """Add tensors while the block runs, which may read them; done when the block ends."""
        waiting = [list(named_tensors)]
        if any(tensor.device.type != "cpu" for _, tensor in waiting[0]):
            self.add(waiting.pop())  # in the order of this thread's work on the device
            yield
            return
        # The thread drops its references to the tensors before it is done: a slot of shared memory
        # must be free then.
        added = _thread_of(os.getpid()).submit(lambda: self.add(waiting.pop()))
        try:
            yield
        finally:
            added.result()

    def texts(self) -> dict[str, str]:
        """Return the digest of each tensor by name: "bfloat16[16, 64]:2f09a1b37c5d8e60"."""
        return {
            name: f"{entry.dtype}{list(entry.shape)}:{entry.content & 0xFFFFFFFFFFFFFFFF:016x}"
            for name, entry in self._entries.items()
        }

    def to_json(self) -> str:
        """Return it as text, for an engine that is reached by HTTP."""
        entries = {
            name: (entry.dtype, entry.shape, entry.content) for name, entry in self._entries.items()
        }
        return json.dumps({"entries": entries, "doubled": self._doubled})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Return the manifest that `to_json` wrote."""
        made, found = cls(), parse_json(text)
        made._doubled = found["doubled"]
        for name, (dtype, shape, content) in found["entries"].items():
            made._entries[name] = _Entry(dtype, tuple(shape), content)
        return made

    def differences(self, arrived: Manifest) -> list[str]:
        """Return the errors in `arrived`, one line per tensor."""
        lines = [f"{name} was sent twice" for name in self._doubled]
        lines += [f"{name} arrived twice" for name in arrived._doubled]
        for name, sent in self._entries.items():
            got = arrived._entries.get(name)
            if got is None:
                lines.append(f"{name} did not arrive")
            elif got.shape != sent.shape:
                lines.append(f"{name} was sent as {list(sent.shape)}, arrived as {list(got.shape)}")
            elif got.dtype != sent.dtype:
                lines.append(f"{name} was sent as {sent.dtype}, arrived as {got.dtype}")
            elif got.content != sent.content:
                lines.append(f"{name} arrived with other content")
        unexpected = [name for name in arrived._entries if name not in self._entries]
        return lines + [f"{name} arrived and was not sent" for name in unexpected]


def content_of(tensor: Tensor) -> int:
    """Return the cheap form of one tensor's content."""
    return _contents([tensor])[0]


def full_digest(tensor: Tensor) -> str:
    """Return type, shape and blake3 of the bits of a tensor as one text."""
    from blake3 import blake3

    dtype = str(tensor.dtype).removeprefix("torch.")
    host_bytes = _bytes_of(tensor).cpu()
    # Not torch's own numpy array: it would forever forbid resizing the storage. Then weights that
    # an engine of this process uses in place could not be offloaded.
    memory = (ctypes.c_ubyte * host_bytes.nbytes).from_address(host_bytes.data_ptr())
    return f"{dtype}{list(tensor.shape)}:{blake3(np.ctypeslib.as_array(memory).data).hexdigest()}"


@functools.cache
def _thread_of(process: int) -> ThreadPoolExecutor:
    """Return the only thread of a process for digests. So both ends of `direct` compute one digest
    per tensor, and allocator caches are not kept for many threads. A fork has its own thread."""
    return ThreadPoolExecutor(1, thread_name_prefix="digests")


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Tensor -> (version, content): both ends of `direct` have the same tensors. torch increments a
tensor's version at every write into it, also through a view."""


def _contents(tensors: list[Tensor]) -> list[int]:
    known = [_known.get(tensor) for tensor in tensors]
    fresh = [
        tensor
        for tensor, of_tensor in zip(tensors, known, strict=True)
        if of_tensor is None or of_tensor[0] != tensor._version
    ]
    if fresh:
        contents = torch.stack([_content(tensor) for tensor in fresh]).tolist()  # one copy for all
        for tensor, content in zip(fresh, contents, strict=True):
            _known[tensor] = tensor._version, content
    return [_known[tensor][1] for tensor in tensors]


@torch.no_grad()
def _content(tensor: Tensor) -> Tensor:
    flat = _bytes_of(tensor)
    num_rows, num_left = divmod(flat.numel(), _BYTES_PER_ROW)
    rows = flat[: flat.numel() - num_left].view(torch.int64).view(num_rows, _WORDS_PER_ROW)
    sums = rows.sum(1)
    if num_left:
        last = flat.new_zeros(_BYTES_PER_ROW)
        last[:num_left] = flat[flat.numel() - num_left :]
        sums = torch.cat([sums, last.view(torch.int64).sum().view(1)])
    return (sums * _weights(sums.numel(), flat.device)).sum()


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor in the order of its indices, as aligned bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    is_aligned = flat.storage_offset() % 8 == 0 and flat.data_ptr() % 8 == 0
    return flat if is_aligned else flat.clone()


def _weights(num_rows: int, device: torch.device) -> Tensor:
    """Return an odd number for each row."""
    capacity = 1 << max(num_rows - 1, 0).bit_length()
    return _many_weights(capacity, device)[:num_rows]


@functools.lru_cache(maxsize=2)
def _many_weights(num_rows: int, device: torch.device) -> Tensor:
    mixed = (
        torch.arange(1, num_rows + 1, device=device) * -0x61C8864680B583EB
    )  # 2^64 / golden ratio
    mixed = (mixed ^ (mixed >> 29)) * -0x40A7B892E31B1A47
    return mixed | 1
