"""Megatron shards -> full tensors under their Hugging Face names, in layer order.

Every rank of the model takes part and receives everything: a layer is gathered over its tensor
(or expert and expert-tensor) group by one collective, and passed on from the pipeline stage that
holds it. Memory beyond the model is one layer at a time. The order is that of the mapping list:
vLLM's layer-by-layer reload buffers whole layers when they come interleaved.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mcore_rl.megatron.parallel import Parallel
from mcore_rl.models.mappings import ParamEntry, hf_shapes, to_hf


class WeightExporter:
    """Gathers one model's weights; build once, iterate whenever they changed.

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
        # Which of the model's expert ranks holds what, and which pipeline stage.
        dtypes = {name: param.dtype for name, param in params.items()}
        self._expert_ranks = _gather_objects((dtypes, parallel.etp.rank()), parallel.tp_ep)
        held_here = {name: dtype for held, _ in self._expert_ranks for name, dtype in held.items()}
        by_stage = _gather_objects(held_here, parallel.pp)
        self._stage_of: dict[str, int] = {}
        self._dtype_of: dict[str, torch.dtype] = {}
        for stage, held in reversed(list(enumerate(by_stage))):  # the first that holds a tied one
            self._stage_of |= dict.fromkeys(held, stage)
            self._dtype_of |= held
        self._device = next(iter(params.values())).device

    def outline(self) -> list[tuple[str, Tensor]]:
        """Return what iterating yields, in its order, as tensors on the meta device."""
        return self._outline(self.entries)

    @torch.no_grad()
    def __iter__(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield one bucket per layer (and one each for what comes before and after them)."""
        for _, layer in itertools.groupby(self.entries, key=lambda entry: entry.layer):
            entries = list(layer)
            stage = self._stage_of[entries[0].megatron_name]
            if stage == self.parallel.pp.rank():
                tensors = self._gather_layer(entries)
            else:
                tensors = [
                    (name, torch.empty_like(tensor, device=self._device))
                    for name, tensor in self._outline(entries)
                ]
            self._pass_on(tensors, stage)
            yield tensors

    def _outline(self, entries: Sequence[ParamEntry]) -> list[tuple[str, Tensor]]:
        return [
            (name, torch.empty(shape, dtype=self._dtype_of[entry.megatron_name], device="meta"))
            for entry in entries
            for name, shape in hf_shapes(entry).items()
        ]

    def _gather_layer(self, entries: Sequence[ParamEntry]) -> list[tuple[str, Tensor]]:
        dense = [entry for entry in entries if not entry.is_expert]
        experts = [entry for entry in entries if entry.is_expert]
        shards = self._dense_shards(dense) | self._expert_shards(experts)
        return [
            item for entry in entries for item in to_hf(entry, shards[entry.megatron_name]).items()
        ]

    def _dense_shards(self, entries: Sequence[ParamEntry]) -> dict[str, list[Tensor]]:
        local = [self.params[entry.megatron_name].detach() for entry in entries]
        by_rank = _all_gather(local, self.parallel.tp)
        return {
            entry.megatron_name: [tensors[i] for tensors in by_rank]
            for i, entry in enumerate(entries)
        }

    def _expert_shards(self, entries: Sequence[ParamEntry]) -> dict[str, list[Tensor]]:
        names = [entry.megatron_name for entry in entries]
        local = [self.params[name].detach() for name in names if name in self.params]
        shards: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        for (held, etp_rank), tensors in zip(
            self._expert_ranks, _all_gather(local, self.parallel.tp_ep), strict=True
        ):
            held_names = [name for name in names if name in held]
            for name, tensor in zip(held_names, tensors, strict=True):
                shards[name][etp_rank] = tensor
        return {
            name: [by_etp[rank] for rank in range(len(by_etp))] for name, by_etp in shards.items()
        }

    def _pass_on(self, tensors: Sequence[tuple[str, Tensor]], stage: int) -> None:
        group = self.parallel.pp
        if group.size() == 1:
            return
        source = dist.get_global_rank(group, stage)
        for same in _by_dtype([tensor for _, tensor in tensors]):
            flat = torch.cat([tensor.reshape(-1) for _, tensor in same])
            dist.broadcast(flat, src=source, group=group)
            parts = flat.split([tensor.numel() for _, tensor in same])
            for (_, tensor), part in zip(same, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


def _gather_objects(value, group: ProcessGroup) -> list:
    gathered = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _all_gather(tensors: Sequence[Tensor], group: ProcessGroup) -> list[list[Tensor]]:
    """Return every rank's tensors, by rank; all ranks hold as many, of the same shapes."""
    if group.size() == 1:
        return [list(tensors)] * group.size()
    gathered = [list(tensors) for _ in range(group.size())]
    for same in _by_dtype(tensors):
        flat = torch.cat([tensor.reshape(-1) for _, tensor in same])
        rows = flat.new_empty(group.size() * flat.numel())
        dist.all_gather_into_tensor(rows, flat, group=group)
        for of_rank, row in zip(gathered, rows.chunk(group.size()), strict=True):
            parts = row.split([tensor.numel() for _, tensor in same])
            for (place, tensor), part in zip(same, parts, strict=True):
                of_rank[place] = part.view_as(tensor)
    return gathered


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[tuple[int, Tensor]]]:
    """Group (place, tensor) by dtype: one collective moves one dtype. The order of the groups is
    that of first appearance, which is the same on every rank."""
    groups: dict[torch.dtype, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault(tensor.dtype, []).append((place, tensor))
    return list(groups.values())
