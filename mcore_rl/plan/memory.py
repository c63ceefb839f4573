"""How much memory a device needs, from formulas: an estimate per pipeline stage.

Every formula stands here with its source. Weights, gradients and optimizer state are those of the
tensors that Megatron allocates, less the padding of its buffers. Activations count what a layer
keeps for its backward pass (Korthikanti et al., arXiv:2205.05198, section 4, redone for gated MLPs,
grouped-query attention and flash attention, which keeps no T x T matrix); of pipeline stages, for
the micro-batches that are under way in the 1F1B schedule (section 4.2.3 there; interleaved:
Narayanan et al., arXiv:2104.04473). That is with fused kernels: the local layers on CPU keep up to
1.6 times as much (tests/distributed/test_distributed_plan.py). Not counted: the CUDA context,
communication buffers, fragmentation, temporary tensors. Leave a tenth of a device for them.

Everything is in bytes; T is tokens of a micro-batch on this device (its context-parallel share).
`moments.py` says what is held at the same time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mcore_rl.cluster.placement import expert_dp_size
from mcore_rl.dtypes import BYTES
from mcore_rl.models.mappings import ParamEntry
from mcore_rl.plan.parameters import StageParameters
from mcore_rl.types import Layout, Part

GRADIENT_BYTES = 4
"""`grad_reduce_in_fp32` (megatron/model.py, wrap_for_training): whatever the weights' type."""
MOMENTS_BYTES = 8
"""Adam's two moments, float32 (Kingma & Ba, arXiv:1412.6980)."""
MASTER_BYTES = 4
"""Float32 copy of weights of another type (Micikevicius et al., arXiv:1710.03740)."""
LOGIT_BLOCK_BYTES = 4 * 2**23
"""One block of float32 logits (megatron/logprobs.py, BLOCK_LOGITS)."""
KEPT_LOGIT_BLOCKS = 4
"""Blocks kept for the backward pass (megatron/logprobs.py, KEPT_BLOCKS)."""

EXPORT_BUCKETS = 3
"""Under way while weights are exported (weight_sync/export.py): as gathered, as put together, and
as passed on to the other stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Memory of one device of a pipeline stage for its different uses, in bytes."""

    actor: Mapping[Part, int]
    """Bytes by part of its state, including the frozen copy of the first model."""
    critic: Mapping[Part, int]
    activations: int
    """Activations of an update; the critic's count like the actor's."""
    logits: int
    forward: int
    """Activations of a pass without gradients: one layer at a time."""
    export: int
    """Weights being exported to engines or to a folder."""
    save: int
    """In host memory: copies of the actor's part of a checkpoint until they are written."""
    save_critic: int


def state_memory(
    stage: StageParameters,
    layout: Layout,
    *,
    dtype: str,
    use_distributed_optimizer: bool,
) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and optimizer state.

    The distributed optimizer cuts the state of every parameter over the ranks that hold a copy of
    it (Rajbhandari et al., arXiv:1910.02054, stage 1).
    """
    state_bytes = MOMENTS_BYTES + (MASTER_BYTES if dtype != "float32" else 0)
    copies = (layout.dp * layout.cp, expert_dp_size(layout))
    optimizer = sum(
        count * state_bytes // (num_copies if use_distributed_optimizer else 1)
        for count, num_copies in zip((stage.dense, stage.experts), copies, strict=True)
    )
    trained = stage.dense + stage.experts
    return stage.total * BYTES[dtype], trained * GRADIENT_BYTES, optimizer


def save_memory(
    stage: StageParameters,
    layout: Layout,
    *,
    dtype: str,
    use_distributed_optimizer: bool,
    saves_frozen: bool,
) -> int:
    """Return the bytes of host memory that a checkpoint takes for a device until it is written.

    Each rank copies its part of weights, masters and moments, those of a data-parallel group as
    much each, and gathers nothing (megatron/shards.py). The distributed optimizer has a master of a
    float32 weight too: the weight itself.

    Args:
        stage: of the pipeline.
        layout: sizes of the axes.
        dtype: of the weights.
        use_distributed_optimizer: state is sharded.
        saves_frozen: what does not train is in the checkpoint too.
    """
    has_masters = use_distributed_optimizer or dtype != "float32"
    trained = BYTES[dtype] + MOMENTS_BYTES + (MASTER_BYTES if has_masters else 0)
    dense = stage.dense * trained + (stage.frozen * BYTES[dtype] if saves_frozen else 0)
    return dense // (layout.dp * layout.cp) + stage.experts * trained // expert_dp_size(layout)


def export_memory(entries: Sequence[ParamEntry], dtype: str, bucket_bytes: int) -> int:
    """Return the bytes of weights that are under way while they are exported.

    The exporter has a few buckets; an engine's loader keeps what it is given of a layer until that
    is complete, so the largest layer counts whole.

    Args:
        entries: of the model.
        dtype: of its weights.
        bucket_bytes: `rollout.update_weights_bucket_mib`; a larger tensor goes alone.
    """
    layers = itertools.groupby(entries, key=lambda entry: entry.layer)
    sizes = [
        [math.prod(hf.shape) * BYTES[dtype] for entry in layer for hf in entry.mapping.sources]
        for _, layer in layers
    ]
    largest = max(max(of_layer) for of_layer in sizes)
    return EXPORT_BUCKETS * max(bucket_bytes, largest) + max(map(sum, sizes))


def activation_memory(
    arch: Mapping[str, Any],
    layout: Layout,
    stages: Sequence[StageParameters],
    stage: int,
    *,
    tokens: int,
    num_micro_batches: int,
    dtype: str,
    sequence_parallel: bool,
    recomputes_layers: bool,
) -> int:
    """Return the bytes that a stage keeps for the backward passes of the micro-batches under way.

    Args:
        arch: arguments of Megatron's TransformerConfig (`ModelFamily.transformer_kwargs`).
        layout: sizes of the axes.
        stages: of the pipeline.
        stage: number of this one.
        tokens: T.
        num_micro_batches: of a minibatch, on one rank.
        dtype: of the activations.
        sequence_parallel: norms and residuals are cut over the tensor-parallel ranks.
        recomputes_layers: recompute_granularity=full: a layer keeps its input alone, and one layer
            at a time is computed again.
    """
    whole = layout.tp if sequence_parallel else 1  # ranks over which hidden states are cut
    inputs = arch["hidden_size"] / whole * BYTES[dtype]
    has_experts = arch.get("moe_layer_freq") or [0] * arch["num_layers"]
    kinds = {
        has: _layer_bytes(arch, bool(has), layout, whole, BYTES[dtype]) for has in set(has_experts)
    }
    per_layer = [kinds[has_experts[layer]] for layer in stages[stage].layers]
    saved_inputs = inputs * len(per_layer) if recomputes_layers else sum(per_layer)
    once = max(per_layer, default=0.0) if recomputes_layers else 0.0
    under_way = min(_micro_batches_under_way(layout, stage), num_micro_batches)
    return math.ceil(tokens * (saved_inputs * under_way + once))


def _micro_batches_under_way(layout: Layout, stage: int) -> float:
    """Return for how many micro-batches a stage holds activations at one time.

    1F1B: the first stage starts pp before its first backward pass, the last one 1. Interleaved, in
    pieces of 1/vpp: pp - stage - 1 and (vpp - 1) pp more (schedules.py, num_warmup_microbatches).
    """
    if layout.vpp == 1:
        return layout.pp - stage
    pieces = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return pieces / layout.vpp


def _layer_bytes(
    arch: Mapping[str, Any], has_experts: bool, layout: Layout, whole: int, element: int
) -> float:
    """Return the bytes that a layer keeps per token; `element` is the size of one number.

    Attention: input of the norm and of the projection; queries and keys before and after their
    norms, if they have any, and after rotation; values and output. MLP: the same two inputs, gate
    and up, the activation of the gate (which the local spec computes again) and the product.
    Experts: the rows sent to them and their output; the router: its input, logits and probabilities
    in float32.
    """
    hidden = arch["hidden_size"] / whole
    queries = arch["num_attention_heads"] * arch["kv_channels"] / layout.tp
    keys = max(arch["num_query_groups"] / layout.tp, 1) * arch["kv_channels"]
    times = 3 if arch.get("qk_layernorm") else 2
    attention = element * (2 * hidden + times * (queries + keys) + keys + queries)
    norm = element * 2 * hidden
    if not has_experts:
        return attention + norm + element * 4 * arch["ffn_hidden_size"] / layout.tp
    # With the load spread evenly a rank computes as many rows as it sends away.
    rows = arch["moe_router_topk"] / whole
    experts = element * rows * (2 * arch["hidden_size"] + 4 * arch["moe_ffn_hidden_size"])
    router = BYTES["float32"] * (hidden + 2 * arch["num_moe_experts"] / whole)
    shared_size = arch.get("moe_shared_expert_intermediate_size") or 0
    return attention + norm + experts + router + element * 4 * shared_size / layout.tp


def kv_bytes_per_token(arch: Mapping[str, Any], dtype: str, engine_ranks: int) -> int:
    """Return the KV cache of one token on one device of an engine.

    Keys and values of every layer (a head at least on every rank); under latent attention the
    compressed vector and the rotated key, whole on every rank (arXiv:2405.04434, section 2.1.3).
    """
    if arch.get("multi_latent_attention"):
        per_layer = arch["kv_lora_rank"] + arch["qk_pos_emb_head_dim"]
    else:
        heads = max(arch["num_query_groups"] // engine_ranks, 1)
        per_layer = 2 * heads * arch["kv_channels"]
    return arch["num_layers"] * per_layer * BYTES[dtype]


def route_bytes_per_token(arch: Mapping[str, Any]) -> int:
    """Return the bytes of the experts that a token was routed to; 0 without experts."""
    num_layers = sum(arch.get("moe_layer_freq") or ())
    per_route = 1 if arch.get("num_moe_experts", 0) <= 256 else 2
    return num_layers * arch.get("moe_router_topk", 0) * per_route


def logit_memory(layout: Layout, stage: int, *, tokens: int, vocab_size: int) -> int:
    """Return the bytes of logits: kept blocks and one being computed, or all if they are fewer."""
    if stage != layout.pp - 1:
        return 0
    every = BYTES["float32"] * tokens * math.ceil(vocab_size / layout.tp)
    return min(every, (KEPT_LOGIT_BLOCKS + 1) * LOGIT_BLOCK_BYTES)
