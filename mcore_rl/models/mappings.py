"""How a Megatron parameter is put together from slices of Hugging Face tensors.

The shard that tensor-parallel rank r of n holds is described by a list of `Block`s: rectangles of
Hugging Face tensors, laid one under the other along dimension 0. The list is the only description;
both directions follow from it, so they cannot disagree:

    shard = cat(read(block) for block in blocks)          to_megatron
    hf[block.hf_name][block.rows, block.cols] = part      to_hf

Worked example: `linear_fc1` of a gated MLP with 4 hidden units, n = 2. Megatron wants every rank to
hold its gate rows above its up rows, so

    rank 0:  gate[0:2], up[0:2]        rank 1:  gate[2:4], up[2:4]

Invariants: over the n ranks the blocks of a sharded parameter cover each of its Hugging Face
tensors exactly once; those of a replicated one cover them once on every rank. Values are copied,
never computed, so a round trip is bit-exact in any dtype.

Names are Megatron's local (unfused) ones, with the global layer and the global expert number.
Nothing here knows of files, process groups, pipeline stages or Transformer Engine's fused names.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

Range = tuple[int, int]
"""Half open: (start, stop)."""

Shape = tuple[int, ...]

Read = Callable[[str, Range, Range | None], Tensor]
"""(hf_name, rows, cols) -> that slice; cols=None means all of them."""


@dataclass(frozen=True, slots=True)
class HfTensor:
    """Name and full shape of one tensor of a Hugging Face checkpoint."""

    name: str
    shape: Shape

    def block(self) -> Block:
        """Return the block that is the whole tensor."""
        return Block(self.name, (0, self.shape[0]))


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of one Hugging Face tensor, with zero rows under it where Megatron pads."""

    hf_name: str
    rows: Range
    cols: Range | None = None
    """None: all columns, or a tensor of one dimension."""
    num_pad_rows: int = 0

    @property
    def num_rows(self) -> int:
        """Rows that come from the Hugging Face tensor, without padding."""
        return self.rows[1] - self.rows[0]


class ParamMapping(ABC):
    """Which Hugging Face slices make up the shards of one Megatron parameter."""

    is_replicated: ClassVar[bool] = False
    """True where every rank holds the whole parameter."""

    @property
    @abstractmethod
    def sources(self) -> tuple[HfTensor, ...]:
        """Every Hugging Face tensor that the parameter is made of."""

    @abstractmethod
    def blocks(self, tp_rank: int, tp_size: int) -> list[Block]:
        """Return what rank `tp_rank` of `tp_size` holds, top to bottom."""


@dataclass(frozen=True, slots=True)
class Replicated(ParamMapping):
    """The same whole tensor on every rank: norms and routers."""

    is_replicated: ClassVar[bool] = True

    hf: HfTensor

    @property
    def sources(self) -> tuple[HfTensor, ...]:
        return (self.hf,)

    def blocks(self, tp_rank: int, tp_size: int) -> list[Block]:
        return [self.hf.block()]


@dataclass(frozen=True, slots=True)
class Column(ParamMapping):
    """ColumnParallelLinear of one tensor: the output dimension (0) is cut."""

    hf: HfTensor

    @property
    def sources(self) -> tuple[HfTensor, ...]:
        return (self.hf,)

    def blocks(self, tp_rank: int, tp_size: int) -> list[Block]:
        return [Block(self.hf.name, _share(self.hf.shape[0], tp_rank, tp_size))]


@dataclass(frozen=True, slots=True)
class Row(ParamMapping):
    """RowParallelLinear: the input dimension (1) is cut."""

    hf: HfTensor

    @property
    def sources(self) -> tuple[HfTensor, ...]:
        return (self.hf,)

    def blocks(self, tp_rank: int, tp_size: int) -> list[Block]:
        cols = _share(self.hf.shape[1], tp_rank, tp_size)
        return [replace(self.hf.block(), cols=cols)]


@dataclass(frozen=True, slots=True)
class GateUp(ParamMapping):
    """`linear_fc1` of a gated MLP: each rank holds its gate rows above its up rows."""

    gate: HfTensor
    up: HfTensor

    @property
    def sources(self) -> tuple[HfTensor, ...]:
        return (self.gate, self.up)

    def blocks(self, tp_rank: int, tp_size: int) -> list[Block]:
        return [
            Block(hf.name, _share(hf.shape[0], tp_rank, tp_size)) for hf in (self.gate, self.up)
        ]


@dataclass(frozen=True, slots=True)
class Qkv(ParamMapping):
    """`linear_qkv`, weight or bias: query group by query group, its queries, its key, its value.

    With two groups of two query heads the rows are q0 q1 k0 v0 | q2 q3 k1 v1, and rank r holds the
    r-th of n equal runs of them. With more ranks than groups a run is part of a group, as
    `SelfAttention.get_query_key_value_tensors` in megatron/core/transformer/attention.py expects.
    """

    q: HfTensor
    k: HfTensor
    v: HfTensor
    num_query_groups: int

    @property
    def sources(self) -> tuple[HfTensor, ...]:
        return (self.q, self.k, self.v)

    def blocks(self, tp_rank: int, tp_size: int) -> list[Block]:
        interleaved = [
            Block(hf.name, _share(hf.shape[0], group, self.num_query_groups))
            for group in range(self.num_query_groups)
            for hf in self.sources
        ]
        num_rows = sum(hf.shape[0] for hf in self.sources)
        return list(rows_of(interleaved, _share(num_rows, tp_rank, tp_size)))


@dataclass(frozen=True, slots=True)
class Vocab(ParamMapping):
    """Embedding or output layer: rows are cut after padding the vocabulary with zero rows."""

    hf: HfTensor
    divisible_by: int = 1
    """Each rank's number of rows is a multiple of it."""

    @property
    def sources(self) -> tuple[HfTensor, ...]:
        return (self.hf,)

    def blocks(self, tp_rank: int, tp_size: int) -> list[Block]:
        vocab_size = self.hf.shape[0]
        padded_size = padded_vocab_size(vocab_size, tp_size, self.divisible_by)
        start, stop = _share(padded_size, tp_rank, tp_size)
        rows = (min(start, vocab_size), min(stop, vocab_size))
        num_pad_rows = (stop - start) - (rows[1] - rows[0])
        return [Block(self.hf.name, rows, num_pad_rows=num_pad_rows)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamEntry:
    """One parameter of the full model and the Hugging Face tensors behind it."""

    megatron_name: str
    """"decoder.layers.7.mlp.experts.local_experts.5.linear_fc1.weight"; numbers are global."""
    mapping: ParamMapping
    layer: int | None = None
    """From 0; None for embedding, final norm and output layer."""
    expert: int | None = None
    """From 0 within its layer; None outside experts."""

    @property
    def is_expert(self) -> bool:
        """True if the parameter is cut over expert-tensor-parallel instead of tensor-parallel."""
        return self.expert is not None


def hf_shapes(entry: ParamEntry) -> dict[str, Shape]:
    """Return the full shape of every Hugging Face tensor that `entry` is made of, by name."""
    return {hf.name: hf.shape for hf in entry.mapping.sources}


def shard_shape(entry: ParamEntry, tp_rank: int, tp_size: int) -> Shape:
    """Return the shape of the shard of rank `tp_rank` of `tp_size`."""
    blocks = entry.mapping.blocks(tp_rank, tp_size)
    whole, cols = hf_shapes(entry)[blocks[0].hf_name], blocks[0].cols
    rest = (cols[1] - cols[0], *whole[2:]) if cols else whole[1:]
    return (sum(block.num_rows + block.num_pad_rows for block in blocks), *rest)


def to_megatron(entry: ParamEntry, tp_rank: int, tp_size: int, read: Read) -> Tensor:
    """Return the shard of rank `tp_rank` of `tp_size`, reading only the slices it is made of.

    Args:
        entry: the parameter.
        tp_rank: 0 .. tp_size - 1; expert-tensor-parallel for experts.
        tp_size: number of shards.
        read: returns a slice of a Hugging Face tensor; `CheckpointReader.read` is one.

    Returns:
        Shard [rows, cols] or [rows], new and contiguous, in the dtype and on the device of what
        `read` returns.
    """
    parts: list[Tensor] = []
    for block in entry.mapping.blocks(tp_rank, tp_size):
        part = read(block.hf_name, block.rows, block.cols)
        parts += [part, part.new_zeros(block.num_pad_rows, *part.shape[1:])]
    return torch.cat(parts)


def to_hf(entry: ParamEntry, shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the full Hugging Face tensors of `entry`, the inverse of `to_megatron`.

    Args:
        entry: the parameter.
        shards: of all ranks, in rank order; one is enough where the mapping is replicated.

    Returns:
        Hugging Face name -> tensor, in the dtype and on the device of the shards: a view of the
        only shard where the tensor lies in one piece of it, otherwise new ones that lie one behind
        the other in memory.
    """
    if entry.mapping.is_replicated:
        shards = shards[:1]
    if len(shards) == 1 and (views := _views(entry, shards[0])):
        return views
    shapes = hf_shapes(entry)
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = shards[0].new_empty(sum(sizes)).split(sizes)
    tensors = {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
    for tp_rank, shard in enumerate(shards):
        row = 0
        for block in entry.mapping.blocks(tp_rank, len(shards)):
            target = take(tensors[block.hf_name], block.rows, block.cols)
            part = shard[row : row + block.num_rows]
            assert part.shape == target.shape, _shape_mismatch(entry, shard)
            target.copy_(part)
            row += block.num_rows + block.num_pad_rows
        assert row == shard.shape[0], _shape_mismatch(entry, shard)
    return tensors


def _views(entry: ParamEntry, shard: Tensor) -> dict[str, Tensor]:
    """Return the tensors as views of the whole parameter, none where one is not in one piece."""
    shapes, blocks = hf_shapes(entry), entry.mapping.blocks(0, 1)
    if len(blocks) != len(shapes):
        return {}
    views, row = {}, 0
    for block in blocks:
        views[block.hf_name] = take(shard[row : row + block.num_rows], None, block.cols)
        assert views[block.hf_name].shape == shapes[block.hf_name], _shape_mismatch(entry, shard)
        row += block.num_rows + block.num_pad_rows
    assert row == shard.shape[0], _shape_mismatch(entry, shard)
    return {name: views[name] for name in shapes}


def take(tensor: Any, rows: Range | None, cols: Range | None) -> Tensor:
    """Return `tensor[rows, cols]` as a view; None means all. Takes safetensors' lazy slices too."""
    taken = tensor[slice(*rows)] if rows else tensor[:]
    return taken[:, slice(*cols)] if cols else taken


def rows_of(blocks: Iterable[Block], rows: Range) -> Iterable[Block]:
    """Yield the parts of stacked `blocks`, without padding, that fall into `rows` of the stack."""
    top = 0
    for block in blocks:
        first, last = max(rows[0] - top, 0), min(rows[1] - top, block.num_rows)
        if first < last:
            yield replace(block, rows=(block.rows[0] + first, block.rows[0] + last))
        top += block.num_rows


def padded_vocab_size(vocab_size: int, tp_size: int, divisible_by: int) -> int:
    """Return the smallest multiple of `tp_size * divisible_by` that holds the vocabulary."""
    multiple = tp_size * divisible_by
    return -(-vocab_size // multiple) * multiple


def _share(size: int, index: int, count: int) -> Range:
    assert 0 <= index < count, f"share {index} of {count}"
    assert size % count == 0, f"{size} rows or columns do not divide into {count}"
    return index * size // count, (index + 1) * size // count


def _shape_mismatch(entry: ParamEntry, shard: Tensor) -> str:
    return f"{entry.megatron_name}: shard of shape {tuple(shard.shape)} is not {entry.mapping}"
