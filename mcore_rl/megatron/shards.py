"""Which rectangles of a checkpoint's tensors this rank writes, and which it reads.

    key "decoder.layers.mlp.linear_fc2.weight" is [layers, 6, 4]; of layer 2 this rank's optimizer
    has the numbers 2 to 15 of 24, in a row:

    numbers  2  3 |  4  5  6  7    8  9 10 11 | 12 13 14
    at      [2, 0, 2]  [2, 1, 0]                [2, 3, 0]
    size    [1, 1, 2]  [1, 2, 4]                [1, 1, 3]

Nothing is gathered, neither to write nor to read. A data-parallel rank writes the moments and
masters of the numbers that its part of the distributed optimizer updates, and of what all of its
group have, weights or the state of an optimizer that is not distributed, one part of as many bytes
as the others'. It reads the numbers that it has. All are views, so to fill them is to load.

Keys, shapes and offsets are those of Megatron's `sharded_state_dict`, of the optimizer those of its
format "fully_reshardable": a rank's range becomes rectangles, which any layout can put together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from mcore_rl.megatron.parallel import Parallel
from mcore_rl.models.mappings import Range, Shape

_OPTIMIZER = "optimizer.state"
_NOT_COMMON = (ShardedBase, LocalNonpersistentObject)


@dataclass(frozen=True, slots=True)
class Shard:
    """A rectangle of the tensor of a key."""

    key: str
    shape: Shape
    """Of the whole tensor."""
    offsets: Shape
    numbers: Tensor
    """A view of the rectangle, with as many dimensions as the whole has."""
    shape_may_differ: bool
    """Whether a checkpoint of another layout may have more or fewer numbers: padding."""


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A tensor that this rank has as the model has it, and its places in the tensors of keys."""

    data: Tensor
    places: list[ShardedTensor]
    """Views of `data`; more than one where a factory takes it apart, as gate and up."""

    @property
    def is_first_copy(self) -> bool:
        """Whether of all but the data-parallel copies this is the one that is written."""
        return not any(self.places[0].replica_id[:-1])  # pyright: ignore[reportIndexIssue]

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.places[0].key


class OptimizerState:
    """Moments and masters of a chained optimizer, as they lie on this rank.

    Args:
        inner: Megatron's chained optimizer, with moments.
        weights: what `sharded_state` of the weights that it trains returned.
        metadata: for Megatron's `sharded_state_dict`.
    """

    def __init__(self, inner: Any, weights: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        self._of_weight = {id(one.data): one for one in _parameters(weights)}
        self.common: dict[Any, Any] = {}
        """What is no tensor, as Megatron arranges it."""
        self._distributed: list[tuple[Any, Tensor, Range, dict[str, Tensor]]] = []
        self._replicated: list[_Parameter] = []
        states = []
        for one in inner.chained_optimizers:
            if isinstance(one, DistributedOptimizer):
                self._distributed += _ranges(one)
                state = one.state_dict()
                state["param_state_sharding_type"] = metadata["distrib_optim_sharding_type"]
            else:
                state = one.sharded_state_dict(dict(weights), metadata=dict(metadata))
                self._replicated += _parameters(state)
            states.append(_without_tensors(state))
        self.common = states[0] if len(states) == 1 else dict(enumerate(states))

    def to_write(self, parallel: Parallel) -> Iterator[Shard]:
        yield from _shared_out(self._replicated, parallel)
        for _, weight, numbers, tensors in self._distributed:
            of_weight = self._of_weight[id(weight)]
            if of_weight.is_first_copy:
                yield from _of_range(of_weight, numbers, tensors)

    def to_read(self) -> Iterator[Shard]:
        for one in self._replicated:
            yield from _whole(one)
        for _, weight, numbers, tensors in self._distributed:
            yield from _of_range(self._of_weight[id(weight)], numbers, tensors)

    def was_read(self) -> None:
        """Have the optimizer take over tensors that it has only in another form."""
        for one, weight, _, tensors in self._distributed:
            one._set_main_param_and_optimizer_states(weight, tensors)


def weights_to_write(weights: Mapping[str, Any], parallel: Parallel) -> Iterator[Shard]:
    """Yield this rank's part of the weights.

    Args:
        weights: Megatron's sharded tensors, whose data are the parameters themselves.
        parallel: process groups.
    """
    return _shared_out(_parameters(weights), parallel)


def weights_to_read(weights: Mapping[str, Any]) -> Iterator[Shard]:
    """Yield all weights of this rank."""
    for one in _parameters(weights):
        yield from _whole(one)


def _shared_out(parameters: Iterable[_Parameter], parallel: Parallel) -> Iterator[Shard]:
    """Yield this rank's part of what all ranks of a data-parallel group have: laid end to end, as
    many bytes as any other's. All of a group have the same in the same order."""
    written = [one for one in parameters if one.is_first_copy]
    for is_expert, group in ((False, parallel.dp_cp), (True, parallel.expert_dp)):
        of_group = [one for one in written if one.is_expert is is_expert]
        total = sum(one.data.nbytes for one in of_group)
        first, last = (total * rank // group.size() for rank in (group.rank(), group.rank() + 1))
        start = 0
        for one in of_group:
            size, flat = one.data.itemsize, one.data.detach().view(-1)
            low, high = (
                min(max(-(-(at - start) // size), 0), flat.numel()) for at in (first, last)
            )
            yield from _of_flat_range(one, (low, high), flat[low:high], "")
            start += one.data.nbytes


def _whole(one: _Parameter) -> Iterator[Shard]:
    flat = one.data.detach().view(-1)
    return _of_flat_range(one, (0, flat.numel()), flat, "")


def _of_range(one: _Parameter, numbers: Range, tensors: Mapping[str, Tensor]) -> Iterator[Shard]:
    for name, tensor in tensors.items():
        if name != "step":  # a number, where torch's own Adam counts by tensor
            yield from _of_flat_range(one, numbers, tensor.detach(), f"{_OPTIMIZER}.{name}.")


def _of_flat_range(one: _Parameter, numbers: Range, flat: Tensor, prefix: str) -> Iterator[Shard]:
    """Yield the rectangles of numbers `first` to `last` of a parameter.

    Args:
        one: whose places they have.
        numbers: first and last, of the parameter row by row.
        flat: [last - first], these numbers, or others in their places: moments.
        prefix: of keys.
    """
    first, last = numbers
    for place in one.places:
        data: Any = place.data
        assert data.is_contiguous(), place
        start = data.storage_offset() - one.data.storage_offset()
        low, high = max(first, start), min(last, start + data.numel())
        axes = place.prepend_axis_num
        for offsets, sizes in rectangles(tuple(place.local_shape), low - start, high - start):
            at = low - first
            low += math.prod(sizes)
            yield Shard(
                prefix + place.key,
                tuple(place.global_shape),
                (
                    *place.global_offset[:axes],
                    *map(sum, zip(place.global_offset[axes:], offsets, strict=True)),
                ),
                flat[at : low - first].view(*[1] * axes, *sizes),
                place.allow_shape_mismatch,
            )


def rectangles(shape: Shape, first: int, last: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield offsets and sizes of rectangles that, one after the other and row by row, are numbers
    `first` to `last` of a tensor of that shape."""
    if first >= last:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    (top, in_top), (bottom, in_bottom) = divmod(first, row), divmod(last, row)
    if top == bottom:
        yield from _in_row(top, shape, in_top, in_bottom)
        return
    if in_top:
        yield from _in_row(top, shape, in_top, row)
        top += 1
    if top < bottom:
        yield (top, *[0] * len(shape[1:])), (bottom - top, *shape[1:])
    yield from _in_row(bottom, shape, 0, in_bottom)


def _in_row(row: int, shape: Shape, first: int, last: int) -> Iterator[tuple[Shape, Shape]]:
    for offsets, sizes in rectangles(shape[1:], first, last):
        yield (row, *offsets), (1, *sizes)


def _ranges(one: Any) -> Iterator[tuple[Any, Tensor, Range, dict[str, Tensor]]]:
    """Yield what a distributed optimizer updates on this rank: itself, each weight, the first and
    last of its numbers, and its master ("param") and moments, [last - first] each."""
    for buckets in one.gbuf_ranges:
        for bucket in (bucket for of_dtype in buckets.values() for bucket in of_dtype):
            for weight, places in bucket["param_map"].items():
                tensors = one._get_main_param_and_optimizer_states(weight)
                yield one, weight, (places["param"].start, places["param"].end), tensors


def _parameters(state: Any) -> Iterator[_Parameter]:
    """Yield the tensors of a sharded state, in its order."""
    for found in _leaves(state):
        if isinstance(found, ShardedTensor):
            assert isinstance(found.data, Tensor), found
            yield _Parameter(found.data, [found])
        elif isinstance(found, ShardedTensorFactory):
            yield _Parameter(found.data, list(_leaves(found.build())))


def _leaves(state: Any) -> Iterator[Any]:
    if isinstance(state, Mapping | list | tuple):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from _leaves(value)
    else:
        yield state


def _without_tensors(state: Any) -> Any:
    """Return a state without what is sharded, or is of this process alone."""
    if isinstance(state, dict):
        plain_values = {
            key: value for key, value in state.items() if not isinstance(value, _NOT_COMMON)
        }
        return {key: _without_tensors(value) for key, value in plain_values.items()}
    if isinstance(state, list):
        return [_without_tensors(value) for value in state if not isinstance(value, _NOT_COMMON)]
    return state
