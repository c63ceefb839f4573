"""Megatron shards -> full tensors under their Hugging Face names, in layer order.

Every rank of the model takes part; the full tensors are made on the receiving ranks, which may be
all. A layer comes in one or more buckets of bounded size. Each bucket is gathered over the tensor
(or expert and expert-tensor) group of the pipeline stage that holds it, to those of its ranks that
have a receiving rank in their pipeline group, and sent on to that rank. Beyond the model a rank
holds at most two buckets: the gathered bytes, and the tensors made of them.

Layers come in the order of the mapping list: vLLM's layer-by-layer reload buffers whole layers when
they come interleaved. Where a layer of experts takes several buckets, each has experts of every
expert-parallel rank, so that all of them gather in every step. Example: experts 0, 1 on one rank,
2, 3 on another, two experts to a bucket: 0 and 2, then 1 and 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mcore_rl.megatron.parallel import Parallel
from mcore_rl.models.mappings import ParamEntry, hf_shapes, shard_shape, to_hf

MAX_BUCKET_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class _Held:
    """What one rank of the expert group holds."""

    dtypes: dict[str, torch.dtype]
    """By canonical name."""
    etp_rank: int


class WeightExporter:
    """Gathers one model's weights; build it once, iterate after each change of the weights.

    Args:
        params: this rank's parameters by canonical name.
        entries: mapping list of the whole model, in layer order.
        parallel: process groups.

    Iterating is collective: every rank of the model must do it together and to the end.
    """

    def __init__(
        self, params: Mapping[str, Tensor], entries: Sequence[ParamEntry], parallel: Parallel
    ) -> None:
        self.params, self.entries, self.parallel = params, entries, parallel
        dtypes = {name: param.dtype for name, param in params.items()}
        # By pipeline stage: what each of the model's expert ranks holds.
        gathered = _gather_objects(_Held(dtypes, parallel.etp.rank()), parallel.tp_ep)
        self._held: list[list[_Held]] = _gather_objects(gathered, parallel.pp)
        self._stage_of: dict[str, int] = {}
        self._dtype_of: dict[str, torch.dtype] = {}
        for stage in reversed(range(len(self._held))):  # the first that holds a tied one
            for of_rank in self._held[stage]:
                self._stage_of |= dict.fromkeys(of_rank.dtypes, stage)
                self._dtype_of |= of_rank.dtypes
        self._device = next(iter(params.values())).device
        self._plans: dict[int, list[list[ParamEntry]]] = {}
        # The ranks of the same pipeline, for every rank of a group.
        self._pipeline = dist.get_process_group_ranks(parallel.pp)
        self._pipelines = {
            group: _gather_objects(self._pipeline, group) for group in (parallel.tp, parallel.tp_ep)
        }

    def outline(self) -> list[tuple[str, Tensor]]:
        """Return what iterating yields, in its order, as tensors on the meta device."""
        return [
            named for entries in self._plan(MAX_BUCKET_BYTES) for named in self._outline(entries)
        ]

    def __iter__(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield the buckets of the usual size on every rank."""
        return self.buckets()

    @torch.no_grad()
    def buckets(
        self, max_bytes: int = MAX_BUCKET_BYTES, receivers: AbstractSet[int] | None = None
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield full tensors in buckets that hold no tensors of two layers.

        Args:
            max_bytes: size of a bucket; one with a single larger tensor, or the tensors of a single
                larger parameter, is larger.
            receivers: global ranks that get the tensors; None: all. The other ranks get empty
                buckets.
        """
        rank = self.parallel.rank
        for entries in self._plan(max_bytes):
            stage = self._stage_of[entries[0].megatron_name]
            tensors: list[tuple[str, Tensor]] = []
            if stage == self.parallel.pp.rank():
                tensors = self._gather(entries, receivers)
            elif receivers is None or rank in receivers:
                tensors = [
                    (name, torch.empty_like(tensor, device=self._device))
                    for name, tensor in self._outline(entries)
                ]
            self._pass_on(tensors, stage, receivers)
            yield tensors if receivers is None or rank in receivers else []
            del tensors  # before the next are made

    def _plan(self, max_bytes: int) -> list[list[ParamEntry]]:
        """Return the parameters of each bucket."""
        if max_bytes not in self._plans:
            self._plans[max_bytes] = list(self._bucket_entries(max_bytes))
        return self._plans[max_bytes]

    def _bucket_entries(self, max_bytes: int) -> Iterator[list[ParamEntry]]:
        for _, layer in itertools.groupby(self.entries, key=lambda entry: entry.layer):
            entries = list(layer)
            place = {entry.megatron_name: i for i, entry in enumerate(entries)}
            bucket: list[ParamEntry] = []
            size = 0
            for unit in self._units(entries, max_bytes):
                unit_size = sum(map(self._num_bytes, unit))
                if bucket and size + unit_size > max_bytes:
                    yield sorted(bucket, key=lambda entry: place[entry.megatron_name])
                    bucket, size = [], 0
                bucket += unit
                size += unit_size
            yield sorted(bucket, key=lambda entry: place[entry.megatron_name])

    def _units(self, entries: Sequence[ParamEntry], max_bytes: int) -> list[list[ParamEntry]]:
        """Return units that stay in one bucket: one expert of each rank, unless that is too
        large."""
        units = [[entry] for entry in entries if not entry.is_expert]
        experts = {entry.megatron_name: entry for entry in entries if entry.is_expert}
        if experts:
            holdings = self._held[self._stage_of[next(iter(experts))]]
            by_rank = [
                [name for name in experts if name in of_rank.dtypes]
                for of_rank in holdings
                if of_rank.etp_rank == 0
            ]
            for names in zip(*by_rank, strict=True):
                unit = [experts[name] for name in names]
                fits = sum(map(self._num_bytes, unit)) <= max_bytes
                units += [unit] if fits else [[entry] for entry in unit]
        return units

    def _num_bytes(self, entry: ParamEntry) -> int:
        itemsize = self._dtype_of[entry.megatron_name].itemsize
        return itemsize * sum(math.prod(shape) for shape in hf_shapes(entry).values())

    def _outline(self, entries: Sequence[ParamEntry]) -> list[tuple[str, Tensor]]:
        return [
            (name, torch.empty(shape, dtype=self._dtype_of[entry.megatron_name], device="meta"))
            for entry in entries
            for name, shape in hf_shapes(entry).items()
        ]

    def _gather(
        self, entries: Sequence[ParamEntry], receivers: AbstractSet[int] | None
    ) -> list[tuple[str, Tensor]]:
        """Return the tensors of parameters of this stage; nothing if this rank wants none."""
        tp, tp_ep = self.parallel.tp, self.parallel.tp_ep
        names = [entry.megatron_name for entry in entries if not entry.is_expert]
        expert_names = [entry.megatron_name for entry in entries if entry.is_expert]
        holdings = self._held[self.parallel.pp.rank()]
        holders = [[name for name in expert_names if name in each.dtypes] for each in holdings]
        by_name = {entry.megatron_name: entry for entry in entries}
        shards = self._shards(by_name, [names] * tp.size(), tp, receivers)
        shards |= self._shards(by_name, holders, tp_ep, receivers)
        return [
            item
            for name, entry in by_name.items()
            if name in shards
            for item in to_hf(entry, shards.pop(name)).items()
        ]

    def _shards(
        self,
        entries: Mapping[str, ParamEntry],
        names_by_rank: Sequence[Sequence[str]],
        group: ProcessGroup,
        receivers: AbstractSet[int] | None,
    ) -> dict[str, list[Tensor]]:
        """Return the shards of parameters in rank order, by name; nothing if this rank wants none.

        Args:
            entries: by name.
            names_by_rank: of which parameters each rank of the group holds a shard.
            group: the ranks that hold them together.
            receivers: as in `buckets`.
        """
        wanting = [
            receivers is None or not receivers.isdisjoint(pipeline)
            for pipeline in self._pipelines[group]
        ]
        held = [(rank, name) for rank, names in enumerate(names_by_rank) for name in names]
        shards: dict[str, list[Tensor]] = {}
        for dtype in dict.fromkeys(self._dtype_of[name] for _, name in held):
            of_dtype = [(rank, name) for rank, name in held if self._dtype_of[name] == dtype]
            own = [self.params[name].detach() for rank, name in of_dtype if rank == group.rank()]
            if group.size() == 1:
                parts = iter(own)
            else:
                shapes = [self._shard_shape(entries[name], rank) for rank, name in of_dtype]
                sizes = [math.prod(shape) for shape in shapes]
                by_rank = [0] * group.size()
                for (rank, _), size in zip(of_dtype, sizes, strict=True):
                    by_rank[rank] += size
                flat = torch.cat(
                    [torch.empty(0, dtype=dtype, device=self._device), *map(_flat, own)]
                )
                gathered = _gather_flat(flat, by_rank, group, wanting)
                if gathered is None:
                    continue
                parts = (
                    part.view(shape)
                    for part, shape in zip(gathered.split(sizes), shapes, strict=True)
                )
            for (_, name), part in zip(of_dtype, parts, strict=True):
                shards.setdefault(name, []).append(part)
        return shards

    def _shard_shape(self, entry: ParamEntry, rank: int) -> tuple[int, ...]:
        """Return the shape of a rank's shard, in its tensor group or its expert group."""
        parallel = self.parallel
        if entry.is_expert:
            index, count = self._held[parallel.pp.rank()][rank].etp_rank, parallel.etp.size()
        else:
            index, count = rank, parallel.tp.size()
        return shard_shape(entry, index, count)

    def _pass_on(
        self,
        tensors: Sequence[tuple[str, Tensor]],
        stage: int,
        receivers: AbstractSet[int] | None,
    ) -> None:
        """Send the tensors of a stage to the receivers in other stages of the pipeline."""
        group, own = self.parallel.pp, self.parallel.pp.rank()
        wanting = [receivers is None or rank in receivers for rank in self._pipeline]
        takers = [rank for rank, wants in enumerate(wanting) if wants and rank != stage]
        if not takers or (own != stage and own not in takers):
            return
        for same in _by_dtype([tensor for _, tensor in tensors]):
            flat = torch.cat([_flat(tensor) for tensor in same])
            if len(takers) == group.size() - 1:
                dist.broadcast(flat, group=group, group_src=stage)
            elif own == stage:
                for rank in takers:
                    dist.send(flat, group=group, group_dst=rank)
            else:
                dist.recv(flat, group=group, group_src=stage)
            if own != stage:
                for tensor, part in zip(
                    same, flat.split([tensor.numel() for tensor in same]), strict=True
                ):
                    tensor.copy_(part.view_as(tensor))


class AdapterExporter:
    """Gathers the adapters of one model, under PEFT's names.

    Args:
        exporter: of their halves.
        names: PEFT's names of each half, by the name that the exporter has for it; others are not
            yielded.
    """

    def __init__(self, exporter: WeightExporter, names: Mapping[str, Sequence[str]]) -> None:
        self._exporter, self._names = exporter, names

    def buckets(
        self, max_bytes: int = MAX_BUCKET_BYTES, receivers: AbstractSet[int] | None = None
    ) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield full tensors as `WeightExporter.buckets` does."""
        for bucket in self._exporter.buckets(max_bytes, receivers):
            yield [(name, tensor) for own, tensor in bucket for name in self._names.get(own, ())]


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def _gather_objects(value: Any, group: ProcessGroup) -> list[Any]:
    gathered = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _gather_flat(
    flat: Tensor, sizes: Sequence[int], group: ProcessGroup, wanting: Sequence[bool]
) -> Tensor | None:
    """Return the data of all ranks, one after the other; None on ranks that do not want it.

    Args:
        flat: what this rank holds.
        sizes: how many numbers each rank holds.
        group: the ranks.
        wanting: which of them get the result.
    """
    own = group.rank()
    gathered = flat.new_empty(sum(sizes)) if wanting[own] else None
    if all(wanting) and len(set(sizes)) == 1:
        dist.all_gather_into_tensor(gathered, flat, group=group)
        return gathered
    transfers = []
    if flat.numel():
        transfers += [
            dist.P2POp(dist.isend, flat, group=group, group_peer=rank)
            for rank, wants in enumerate(wanting)
            if wants and rank != own
        ]
    if gathered is not None:
        for rank, part in enumerate(gathered.split(list(sizes))):
            if rank == own:
                part.copy_(flat)
            elif part.numel():
                transfers.append(dist.P2POp(dist.irecv, part, group=group, group_peer=rank))
    for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
        transfer.wait()
    return gathered


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors by dtype: one collective moves one dtype. The order of the groups is that of
    first appearance, which is the same on every rank."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
