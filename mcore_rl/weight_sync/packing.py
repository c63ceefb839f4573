"""A bucket as one sequence of bytes, and the description needed to make tensors from it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_rl.lazy_torch import torch
from mcore_rl.weight_sync.base import NamedTensors

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PackedBucket:
    """Positions of a bucket's tensors in a sequence of bytes; each begins at a multiple of 64."""

    names: list[str]
    dtypes: list[str]
    """torch's names: "float32"."""
    shapes: list[tuple[int, ...]]
    sizes: list[int]
    """In bytes."""

    @classmethod
    def of(cls, bucket: NamedTensors) -> PackedBucket:
        """Return how a bucket is laid out."""
        return cls(
            [name for name, _ in bucket],
            [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            [tuple(tensor.shape) for _, tensor in bucket],
            [tensor.numel() * tensor.element_size() for _, tensor in bucket],
        )

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the whole bucket."""
        return sum(size + -size % _ALIGNMENT for size in self.sizes)

    def write(self, bucket: NamedTensors, buffer: Tensor) -> None:
        """Copy the bucket into a buffer of bytes."""
        for (_, tensor), (_, place) in zip(bucket, self.read(buffer), strict=True):
            place.copy_(tensor.detach())

    def read(self, buffer: Tensor) -> list[tuple[str, Tensor]]:
        """Return the tensors in a buffer of bytes, as views of it."""
        tensors, begin = [], 0
        for name, dtype, shape, size in zip(
            self.names, self.dtypes, self.shapes, self.sizes, strict=True
        ):
            tensors.append(
                (name, buffer[begin : begin + size].view(getattr(torch, dtype)).view(shape))
            )
            begin += size + -size % _ALIGNMENT
        return tensors
