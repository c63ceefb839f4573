"""Parts of a model's state that move to host memory and back, bit for bit.

    optimizer = Offloadable("optimizer", lambda: optimizer_tensors(inner, chunks))
    optimizer.offload()        # the device holds no byte of it
    optimizer.restore()        # every tensor is what it was

Storages move, not tensors: parameters are views of Megatron's buffers, and whoever holds a tensor
(the optimizer, the exporter, a graph) holds the same one afterwards. A storage that is away has no
bytes, and to read it ends the process with a segmentation fault. So whoever reads says so first:
`check_is_here`, or `while_here` for what is read later.

On CPU the same is done, from one buffer into another; what is freed goes back to the system.
Megatron's own `offload_to_cpu` knows neither and pins memory for each tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from mcore_rl.errors import OffloadError

CHUNK_BYTES = 2**28
"""Of host memory. A power of two: torch rounds what it pins up to one."""


class Offloadable:
    """Tensors whose storages are on the device or in host memory, all together.

    Args:
        name: for errors: "actor.param".
        tensors: returns them; asked before each move to host memory, since an optimizer makes its
            moments late and a checkpoint brings new ones.
    """

    def __init__(self, name: str, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self.name, self._tensors = name, tensors
        self._away: _HostCopy | None = None

    @property
    def is_away(self) -> bool:
        return self._away is not None

    @torch.no_grad()
    def offload(self) -> None:
        """Move to host memory.

        Raises:
            OffloadError: if it is there already, or a storage is also a numpy array, which would be
                left without memory.
        """
        self.check_is_here("offload")
        storages = distinct_storages(self._tensors())
        for storage in storages:
            if not storage.resizable():
                raise OffloadError(
                    f"{self.name} cannot be offloaded: {storage.nbytes()} bytes of it are also a "
                    "numpy array"
                )
        self._away = _HostCopy(storages)
        self._away.take()
        _return_freed_memory(storages)

    @torch.no_grad()
    def restore(self) -> None:
        """Move back to the device.

        Raises:
            OffloadError: if it is there already.
        """
        if self._away is None:
            raise OffloadError(f"{self.name} is on its device: there is nothing to restore")
        self._away.give_back()
        self._away = None

    def check_is_here(self, reader: str) -> None:
        """Raise an OffloadError that names `reader` if it is in host memory."""
        if self._away is not None:
            raise OffloadError(f"{reader} needs {self.name}, which is in host memory")

    def while_here(self, reader: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the mapping, to be read only while this is on its device."""
        return _WhileHere(self, reader, tensors)


def distinct_storages(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """Return the storages behind the tensors, each once, in order; empty ones are left out."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return list({s.data_ptr(): s for s in storages if s.nbytes()}.values())


def parameters_of(chunks: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    """Yield the weights, frozen ones and the padding of their buffers among them."""
    for chunk in chunks:
        yield from chunk.parameters()


def gradients_of(chunks: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the gradient buffers of chunks that are wrapped for training."""
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield buffer.grad_data


def optimizer_tensors(inner: Any, chunks: Iterable[torch.nn.Module]) -> Iterator[Tensor]:
    """Yield moments and masters; float32 weights, which are their own masters, are not among them.

    Args:
        inner: Megatron's chained optimizer.
        chunks: whose weights it trains.
    """
    of_weights = {storage.data_ptr() for storage in distinct_storages(parameters_of(chunks))}
    for one in inner.chained_optimizers:
        masters = (param for group in one.optimizer.param_groups for param in group["params"])
        states = (value for state in one.optimizer.state.values() for value in state.values())
        for tensor in (*masters, *filter(torch.is_tensor, states)):
            if tensor.untyped_storage().data_ptr() not in of_weights:
                yield tensor


class _HostCopy:
    """The bytes of storages end to end in chunks of host memory, pinned where they come from CUDA.

    Chunks, since torch pins powers of two: one piece of 43 GiB would take 64.
    """

    def __init__(self, storages: Sequence[UntypedStorage]) -> None:
        self._storages = storages
        self._sizes = [storage.nbytes() for storage in storages]
        total = sum(self._sizes)
        pin = any(storage.device.type == "cuda" for storage in storages)
        self._chunks = [
            torch.empty(min(CHUNK_BYTES, total - start), dtype=torch.uint8, pin_memory=pin)
            for start in range(0, total, CHUNK_BYTES)
        ]

    def take(self) -> None:
        for storage, pieces in self._pieces():
            for piece, data in zip(pieces, _split(storage, pieces), strict=True):
                piece.copy_(data)  # over when it returns, on CUDA too
            storage.resize_(0)

    def give_back(self) -> None:
        for storage, pieces in self._pieces():
            storage.resize_(sum(map(len, pieces)))
            for piece, data in zip(pieces, _split(storage, pieces), strict=True):
                data.copy_(piece)

    def _pieces(self) -> Iterator[tuple[UntypedStorage, list[Tensor]]]:
        """Yield each storage with its places in host memory."""
        position = 0
        for storage, size in zip(self._storages, self._sizes, strict=True):
            pieces, end = [], position + size
            while position < end:
                chunk, start = divmod(position, CHUNK_BYTES)
                stop = min(CHUNK_BYTES, start + end - position)
                pieces.append(self._chunks[chunk][start:stop])
                position += stop - start
            yield storage, pieces


def _split(storage: UntypedStorage, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the bytes of a storage in pieces of the given lengths."""
    whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return whole.split([len(piece) for piece in pieces])


def _return_freed_memory(storages: Sequence[UntypedStorage]) -> None:
    """Give what was freed to whoever asks next, in another process too."""
    if any(storage.device.type == "cuda" for storage in storages):
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's alone
        trim(0)


class _WhileHere(Mapping[str, Tensor]):
    def __init__(self, owner: Offloadable, reader: str, tensors: Mapping[str, Tensor]) -> None:
        self._owner, self._reader, self._tensors = owner, reader, tensors

    def __getitem__(self, name: str) -> Tensor:
        self._owner.check_is_here(self._reader)
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
