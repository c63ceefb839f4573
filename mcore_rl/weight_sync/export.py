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
from torch.nn import Parameter

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
        self, params: Mapping[str, Parameter], entries: Sequence[ParamEntry], parallel: Parallel
    ) -> None:
        self.params, self.entries, self.parallel = params, entries, parallel
        # Which of the model's expert ranks holds what, and which pipeline stage.
        self._expert_ranks = _gather_objects((set(params), parallel.etp.rank()), parallel.tp_ep)
        held_here = set().union(*(names for names, _ in self._expert_ranks))
        by_stage = _gather_objects(held_here, parallel.pp)
        self._stage_of = {
            entry.megatron_name: next(
                stage for stage, names in enumerate(by_stage) if entry.megatron_name in names
            )
            for entry in entries
        }
        example = next(iter(params.values()))
        self._dtype, self._device = example.dtype, example.device

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
                    (name, torch.empty(shape, dtype=self._dtype, device=self._device))
                    for entry in entries
                    for name, shape in hf_shapes(entry).items()
                ]
            self._pass_on(tensors, stage)
            yield tensors

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
        flat = torch.cat([tensor.reshape(-1) for _, tensor in tensors])
        dist.broadcast(flat, src=source, group=group)
        for (_, tensor), part in zip(
            tensors, flat.split([tensor.numel() for _, tensor in tensors]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))


def _gather_objects(value, group: ProcessGroup) -> list:
    gathered = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _all_gather(tensors: Sequence[Tensor], group: ProcessGroup) -> list[list[Tensor]]:
    """Return every rank's tensors, by rank; all ranks hold as many, of the same shapes."""
    if group.size() == 1 or not tensors:
        return [list(tensors)] * group.size()
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    gathered = flat.new_empty(group.size() * flat.numel())
    dist.all_gather_into_tensor(gathered, flat, group=group)
    sizes = [tensor.numel() for tensor in tensors]
    return [
        [part.view_as(tensor) for part, tensor in zip(row.split(sizes), tensors, strict=True)]
        for row in gathered.chunk(group.size())
    ]
