"""LoRA on a built Megatron model: the base is frozen, adapters train (models/lora.py has names).

`LoraAdapters` hangs an adapter on each chosen linear layer of the local spec, by a forward hook, so
that the layer keeps its class and its parameter's name. One adapter is cut as its layer is: of a
column-parallel layer B is cut and A is whole on every rank, of a row-parallel one A is cut and B is
whole. Invariants:

- With B = 0, as it begins, or inside `disabled()`, the model computes the base bit by bit.
- The base is never written to: merged weights are new tensors, W + alpha / r * B A in float32.
- Initial values depend on seed, name and full shape, not on the layout.
- Gradients of the whole half are those of one process; `_collectives` says what sums them.
- Gradient norms count every number once: `shared` is set where another rank of the group counts it.

It does not train biases, norms, routers or embeddings, and knows no dropout.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import linear

from mcore_rl.errors import require
from mcore_rl.megatron.config import LoraConfig
from mcore_rl.megatron.model import PolicyModel, canonical_name, shard_group
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.models.lora import (
    Adapter,
    adapted_rows,
    adapters_of,
    digest_of,
    linear_weights,
    number_of,
)
from mcore_rl.models.mappings import GateUp, ParamEntry, Row, take, to_megatron

logger = logging.getLogger(__name__)

Collective = Callable[[Tensor], Tensor]


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Collectives:
    """What passes between the ranks of a layer's group in `B through(A x)`; each has a backward."""

    of_a: Collective = _unchanged
    through: Collective = _unchanged
    of_b: Collective = _unchanged


def _collectives(
    entry: ParamEntry, group: ProcessGroup, *, is_local: bool, sequence_parallel: bool
) -> Collectives:
    """Return the collectives of a layer's adapter, which follow from those of the layer.

    | layer            | of A  | between A and B                             | of B  |
    |------------------|-------|---------------------------------------------|-------|
    | whole            |       |                                             |       |
    | column           |       | gather tokens, or backward: sum             |       |
    | row              |       | sum and scatter tokens, or sum              |       |
    | column, is_local | copy  |                                             |       |
    | row, is_local    |       |                                             | copy  |

    Left of "or": under sequence parallelism. A local layer (an expert, a shared expert that is
    overlapped) leaves communication to whoever calls it: its input holds the tokens of the whole
    group, gradients of its input and its output are parts of sums. So the gradient of its whole
    half is one too, and "copy" sums it over the group. The whole halves of the others see all
    tokens or, under sequence parallelism, a part of them; then their mark `sequence_parallel` has
    finalize_model_grads sum their gradient.
    """
    if entry.mapping.is_replicated:
        return Collectives()
    copy = partial(copy_to_tensor_model_parallel_region, group=group)
    is_row = isinstance(entry.mapping, Row)
    if is_local:
        return Collectives(of_b=copy) if is_row else Collectives(of_a=copy)
    if is_row:
        scatter = partial(reduce_scatter_to_sequence_parallel_region, group=group)
        reduce = partial(reduce_from_tensor_model_parallel_region, group=group)
        return Collectives(through=scatter if sequence_parallel else reduce)
    gather = partial(gather_from_sequence_parallel_region, group=group)
    return Collectives(through=gather if sequence_parallel else copy)


class LowRank(torch.nn.Module):
    """This rank's part of the adapter of one linear layer.

    Args:
        lora_A: [r, in] or its columns.
        lora_B: [out, r] or its rows.
        scale: alpha / r.
        collectives: of the layer.
        rows: [out, 1], 0 for rows of B that count as 0, so that what is fused with an adapted layer
            stays as it is; None where all count.
    """

    rows: Tensor | None

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        collectives: Collectives,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        self.lora_A, self.lora_B = torch.nn.Parameter(lora_A), torch.nn.Parameter(lora_B)
        self.scale, self.collectives = scale, collectives
        self.is_enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Return alpha / r * B (A x), laid out as the layer's output is."""
        low = linear(x, self.collectives.of_a(self.lora_A)) * self.scale
        return linear(self.collectives.through(low), self.collectives.of_b(self._b()))

    def _b(self) -> Tensor:
        return self.lora_B if self.rows is None else self.lora_B * self.rows

    def add_to(self, _: Any, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> Any:
        """Forward hook of the layer, which returns (output, bias)."""
        if not self.is_enabled:
            return None
        return output[0] + self(inputs[0]), output[1]

    def merged_into(self, weight: Tensor) -> Tensor:
        """Return W + alpha / r * B A of this rank's part: float32 inside, in the dtype of W."""
        product = self._b().float() @ self.lora_A.float()
        return (weight.float() + self.scale * product).to(weight.dtype)


class LoraAdapters:
    """The adapters of one model; building them freezes the base.

    Args:
        chunks: model chunks with the base's weights, not yet wrapped for training.
        params: their parameters by canonical name.
        entries: mapping list of the whole model.
        config: rank, alpha and which layers.
        parallel: process groups.
        seed: of the initial values of A.

    Raises:
        UserError: if no layer, or none that can be adapted, goes by the names asked for.
    """

    def __init__(
        self,
        chunks: Sequence[PolicyModel],
        params: Mapping[str, Tensor],
        entries: Sequence[ParamEntry],
        config: LoraConfig,
        parallel: Parallel,
        seed: int,
    ) -> None:
        self.config, self._parallel = config, parallel
        weights = linear_weights(entries)
        self.adapters = adapters_of(weights, config.rank, config.names)
        layers = _linear_layers(chunks, parallel)
        self._bound: dict[str, LowRank] = {}
        """By the canonical name of the weight."""
        for chunk in chunks:
            _freeze(chunk)
        for adapter in self.adapters:
            name = adapter.weight.megatron_name
            if name in params:
                require(
                    name in layers,
                    "model.lora_rank",
                    config.rank,
                    f"cannot adapt {name}: it is not the weight of a linear layer alone",
                    "Set actor.megatron.transformer_impl=local.",
                )
                self._bound[name] = _bind(adapter, layers[name], config, parallel, seed)
        logger.info("LoRA: %d modules of %d", len(self.adapters), len(weights))
        self._base = _digest(params, entries, parallel)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of adapters and a run that reads it must have in common, by key."""
        modules = sorted(self.config.target_modules)
        return {
            "model.lora_rank": self.config.rank,
            "model.lora_alpha": self.config.alpha,
            "model.target_modules": modules,
            "weights of model.path": self._base,
        }

    @property
    def entries(self) -> list[ParamEntry]:
        """The mapping list of the adapters of the whole model, in layer order."""
        return [entry for adapter in self.adapters for entry in (adapter.a, adapter.b)]

    @property
    def params(self) -> dict[str, torch.nn.Parameter]:
        """This rank's parameters by canonical name."""
        return {
            entry.megatron_name: param
            for adapter in self.adapters
            if (bound := self._bound.get(adapter.weight.megatron_name))
            for entry, param in ((adapter.a, bound.lora_A), (adapter.b, bound.lora_B))
        }

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Have the model compute what the base does."""
        for bound in self._bound.values():
            bound.is_enabled = False
        try:
            yield
        finally:
            for bound in self._bound.values():
                bound.is_enabled = True

    def merged(self, params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the base's parameters with the adapters of the moment in them, made when read."""
        return _Merged(params, self._bound)

    def sharded_state(self) -> dict[str, Any]:
        """Return the adapters as Megatron's distributed checkpoints take them, by name."""
        entries = {entry.megatron_name: entry for entry in self.entries}
        params = self.params.items()
        return {
            "adapters": {
                name: _sharded(entries[name], param, self._parallel) for name, param in params
            }
        }


class _Merged(Mapping[str, Tensor]):
    def __init__(self, params: Mapping[str, Tensor], bound: Mapping[str, LowRank]) -> None:
        self._params, self._bound = params, bound

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        bound = self._bound.get(name)
        return bound.merged_into(self._params[name]) if bound else self._params[name]

    def __contains__(self, name: object) -> bool:
        return name in self._params

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


def _linear_layers(chunks: Sequence[PolicyModel], parallel: Parallel) -> dict[str, torch.nn.Module]:
    """Return every linear layer of the local spec by the canonical name of its weight."""
    return {
        canonical_name(f"{name}.weight", chunk, parallel): module
        for chunk in chunks
        for name, module in chunk.named_modules()
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, Linear))
    }


def _freeze(chunk: PolicyModel) -> None:
    """Have nothing of the base train, and gradients flow through all of it nonetheless."""
    chunk.requires_grad_(False)

    def want_gradient(_: Any, __: Any, hidden: Tensor) -> None:
        if torch.is_grad_enabled():
            hidden.requires_grad_()

    if chunk.pre_process:
        # A block that is recomputed passes its parameters no gradient unless its input wants one
        # (tensor_parallel/random.py, CheckpointFunction).
        embedding: Any = chunk.embedding
        embedding.register_forward_hook(want_gradient)


def _bind(
    adapter: Adapter, layer: Any, config: LoraConfig, parallel: Parallel, seed: int
) -> LowRank:
    """Hang an adapter with initial values on a layer and return it."""
    entry, weight = adapter.weight, layer.weight
    group = shard_group(entry, parallel)
    is_local = entry.is_expert or getattr(layer, "explicit_expert_comm", False)
    sequence_parallel = layer.config.sequence_parallel and group.size() > 1 and not is_local
    (full_a,) = adapter.a.mapping.sources
    values_a = to_megatron(
        adapter.a,
        group.rank(),
        group.size(),
        lambda name, rows, cols: take(_initial_a(name, full_a.shape, seed), rows, cols),
    )
    rows = adapted_rows(adapter, group.rank(), group.size())
    bound = LowRank(
        values_a.to(weight),
        weight.new_zeros(weight.shape[0], config.rank),
        config.scale,
        _collectives(entry, group, is_local=is_local, sequence_parallel=sequence_parallel),
        None if rows is None else rows.to(weight),
    )
    for half, param in ((adapter.a, bound.lora_A), (adapter.b, bound.lora_B)):
        _mark(half, param, group, sequence_parallel=sequence_parallel)
    layer.add_module("adapter", bound)
    layer.register_forward_hook(bound.add_to)
    return bound


def _initial_a(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return all of an A: uniform within 1 / sqrt(in), as PEFT draws it, float32."""
    bound = shape[1] ** -0.5
    generator = torch.Generator().manual_seed(number_of(f"{seed} {name}"))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _mark(half: ParamEntry, param: Any, group: ProcessGroup, *, sequence_parallel: bool) -> None:
    """Set what Megatron reads of a parameter."""
    is_whole = half.mapping.is_replicated
    param.allreduce = not half.is_expert  # False: summed over expert data parallel (DDP)
    param.sequence_parallel = is_whole and sequence_parallel  # finalize_model_grads
    # Gradient norms (optimizer.py, get_main_grads_for_grad_norm) count what is tensor parallel and
    # not shared. Without the first they would count on tensor-parallel rank 0 alone, also experts,
    # which are not cut over that group.
    param.tensor_model_parallel = True
    param.shared = is_whole and group.rank() > 0


def _sharded(entry: ParamEntry, param: Tensor, parallel: Parallel) -> Any:
    """Return what says which part of one half of an adapter this rank has."""
    group = shard_group(entry, parallel)
    data_parallel = parallel.expert_dp if entry.is_expert else parallel.dp_cp
    axis = 1 if isinstance(entry.mapping, Row) else 0
    whole = entry.mapping.is_replicated
    tensor = ShardedTensor.from_rank_offsets(
        entry.megatron_name,
        param,
        *([] if whole else [(axis, group.rank(), group.size())]),
        replica_id=(0, group.rank() if whole else 0, data_parallel.rank()),
    )
    # Each rank has its gate rows above its up rows.
    is_gated = isinstance(entry.mapping, GateUp)
    return apply_swiglu_sharded_factory(tensor, ()) if is_gated else tensor


def _digest(params: Mapping[str, Tensor], entries: Sequence[ParamEntry], parallel: Parallel) -> str:
    """Return a number of 64 bits that any other weights would hardly give; collective.

    The sum over all numbers of the full model of their bits, each tensor weighted by its name: it
    does not depend on the layout, and padding adds 0.
    """
    some = next(iter(params.values()))
    dense, experts = torch.zeros(2, 1, dtype=torch.int64, device=some.device)
    for entry in entries:
        name, param = entry.megatron_name, params.get(entry.megatron_name)
        if param is None or (entry.mapping.is_replicated and shard_group(entry, parallel).rank()):
            continue
        if name == "embedding.word_embeddings.weight" and not parallel.is_first_stage:
            continue  # the copy of a tied output layer
        of_kind = experts if entry.is_expert else dense
        of_kind += digest_of(name, param)
    dist.all_reduce(dense, group=parallel.tp)
    dist.all_reduce(experts, group=parallel.tp_ep)
    total = dense + experts
    dist.all_reduce(total, group=parallel.pp)
    return f"{int(total) % (1 << 64):016x}"
