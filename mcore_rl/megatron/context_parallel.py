"""Context parallelism: packed rows cut over ranks, and quantities of sequences that are cut.

Every sequence of a row is cut into 2 cp chunks of equal length, of which rank r holds chunks r and
2 cp - 1 - r, one after the other ("zig-zag"): causal attention then costs every rank the same. It
is the cut that Megatron's rotary embedding and Transformer Engine assume.

Example: cp = 2, one sequence of 8 positions: rank 0 holds 0 1 6 7, rank 1 holds 2 3 4 5.

Invariants: what a rank computes of its positions is summed over ranks by the gradient reduction
(data and context parallel together); a quantity of a whole sequence is the same number on every
rank, and its gradient reaches the positions of every rank.

Shapes: T positions of the whole row, L = T / cp of them on this rank, S sequences.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.nn.functional import all_reduce

from mcore_rl.data.batch import PackedBatch
from mcore_rl.segments import Segments


def row_boundaries(cu_seqlens: Tensor) -> tuple[int, ...]:
    """Return the boundaries of a row as numbers; they are read from the device once a row.

    Args:
        cu_seqlens: [S + 1] int32, the same tensor in all layers, never written to.
    """
    numbers: tuple[int, ...] | None = getattr(cu_seqlens, "numbers", None)
    if numbers is None:
        numbers = tuple(cu_seqlens.tolist())
        cu_seqlens.numbers = numbers  # pyright: ignore[reportAttributeAccessIssue]
    return numbers


@functools.lru_cache(maxsize=64)
def local_positions(boundaries: tuple[int, ...], rank: int, size: int) -> Tensor:
    """Return the positions of the whole row that `rank` holds, in its order, [L] int64.

    Args:
        boundaries: where sequences begin and end in the row, with padding: multiples of 2 * size.
        rank: in the context-parallel group of `size` ranks.
        size: ranks of the group.
    """
    positions = []
    for start, stop in itertools.pairwise(boundaries):
        assert (stop - start) % (2 * size) == 0, "sequences are aligned to 2 * cp"
        chunk = (stop - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            positions.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(positions)


@functools.lru_cache(maxsize=64)
def _gathered_order(boundaries: tuple[int, ...], size: int) -> Tensor:
    """Return where each position of the row lies among the parts of all ranks, [T] int64."""
    parts = [local_positions(boundaries, rank, size) for rank in range(size)]
    return torch.cat(parts).argsort()


def gather_positions(local_L: Tensor, boundaries: Sequence[int], group: ProcessGroup) -> Tensor:
    """Return the whole row from the parts of all ranks; the gradient is summed and cut again.

    Args:
        local_L: [L, ...] any float dtype, this rank's part.
        boundaries: of the whole row.
        group: context parallel.

    Returns:
        [T, ...], the same on every rank.
    """
    if group.size() == 1:
        return local_L
    gathered = tensor_parallel.gather_from_sequence_parallel_region(
        local_L, tensor_parallel_output_grad=True, group=group
    )
    return gathered[_gathered_order(tuple(boundaries), group.size()).to(local_L.device)]


def cut_batch(batch: PackedBatch, group: ProcessGroup) -> PackedBatch:
    """Return this rank's part of a packed row.

    Tensors with a value per position are cut; boundaries and lengths stay those of the whole row.
    """
    if group.size() == 1:
        return batch
    boundaries = tuple(batch.cu_seqlens_padded.tolist())
    index = local_positions(boundaries, group.rank(), group.size()).to(batch.input_ids_T.device)
    segments = CutSegments(
        sequence_T=batch.segments.sequence_T[index],
        mask_T=batch.segments.mask_T[index],
        num_tokens_S=batch.segments.num_tokens_S,
        group=group,
    )
    per_position = {
        field.name: getattr(batch, field.name)[index]
        for field in fields(batch)
        if field.name.endswith(("_T", "_TLK")) and getattr(batch, field.name) is not None
    }
    return replace(batch, segments=segments, **per_position)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutSegments(Segments):
    """Segments of which this rank holds a part: sums over a sequence go over all ranks."""

    group: ProcessGroup
    """Context parallel."""

    def sum(self, x_T: Tensor) -> Tensor:
        """Return the sum of `x_T` [L] over the trained tokens of each whole sequence, [S].

        Every rank of the group must call it, and run its backward, as often as the others.
        """
        # Each rank's loss depends on the sum, so the gradient is summed over ranks too. (Megatron's
        # mappings would drop that sum where the gradient is not contiguous, mappings.py:31.)
        # Not super(): slots=True makes the class anew, and super() would look for the old one.
        return all_reduce(Segments.sum(self, x_T), group=self.group)
