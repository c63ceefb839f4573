"""Layers for Megatron's local spec that need neither Transformer Engine nor CUDA.

`PackedAttention` is causal grouped-query attention over packed sequences (the "thd" format) by
torch's scaled-dot-product attention; `RMSNorm` carries the sequence-parallel mark that Megatron's
own wrapper refuses to give. `local_block_spec` puts both into the local spec. Both are neutral to
the device. Under context parallelism queries stay where they are, and keys and values of the whole
row are gathered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from mcore_rl.megatron.context_parallel import gather_positions


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a packed row; the `core_attention` of the spec."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        assert not config.attention_dropout, "attention dropout is not implemented here"
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return [L, heads * d], attention within each packed sequence.

        `query` is [L, heads, d], `key` and `value` are [L, groups, d], of any float dtype; L is
        this rank's part of the row. `packed_seq_params` holds the boundaries of the whole row
        ("thd" format). The signature is Megatron's.
        """
        assert packed_seq_params is not None and attention_mask is None, "packed rows only"
        padded = packed_seq_params.cu_seqlens_q_padded
        boundaries = (packed_seq_params.cu_seqlens_q if padded is None else padded).tolist()
        if self.cp_group.size() > 1:
            both = torch.cat([key, value], dim=-1)
            key, value = gather_positions(both, boundaries, self.cp_group).chunk(2, dim=-1)
        spans = causal_spans(boundaries, self.cp_group.rank(), self.cp_group.size())
        return packed_causal_attention(query, key, value, spans, self.scale).flatten(-2)


class Span(NamedTuple):
    """Neighbouring queries and the keys up to and including that of the last query."""

    queries: range
    """Positions in this rank's part of the row."""
    keys: range
    """Positions in the whole row, from the first of the sequence on; at least as many."""


def causal_spans(boundaries: Sequence[int], rank: int = 0, size: int = 1) -> list[Span]:
    """Return what each run of this rank's queries sees, in order.

    Args:
        boundaries: cumulative lengths of the whole row's sequences, first 0, last T.
        rank: in the context-parallel group; see `context_parallel` for the positions it holds.
        size: ranks of that group.
    """
    spans = []
    for start, stop in itertools.pairwise(boundaries):
        if size == 1:
            spans.append(Span(range(start, stop), range(start, stop)))
            continue
        chunk = (stop - start) // (2 * size)
        for half, number in enumerate((rank, 2 * size - 1 - rank)):
            first = start // size + half * chunk
            keys = range(start, start + (number + 1) * chunk)
            spans.append(Span(range(first, first + chunk), keys))
    return [span for span in spans if span.queries]


def packed_causal_attention(
    query_L: Tensor, key_T: Tensor, value_T: Tensor, spans: Sequence[Span], scale: float
) -> Tensor:
    """Return causal attention within each span, [L, heads, d].

    Neighbouring spans of similar length are padded to one batch: right padding cannot reach
    earlier tokens through a causal mask, and the padded rows are dropped.

    Args:
        query_L: [L, heads, d] float.
        key_T: [T, groups, d] float; groups divides heads.
        value_T: as `key_T`.
        spans: cover the queries, in order; the last query of a span sits at its last key.
        scale: factor on the scores.
    """
    outputs = []
    grouped = query_L.shape[1] != key_T.shape[1]
    for batch in _batches_of_similar_length(spans):
        queries, keys = [span.queries for span in batch], [span.keys for span in batch]
        mask = None if queries == keys else _causal_mask(queries, keys, query_L.device)
        padded = F.scaled_dot_product_attention(
            *(
                x[_padded_index(ranges, x.device)].transpose(1, 2)
                for x, ranges in ((query_L, queries), (key_T, keys), (value_T, keys))
            ),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=grouped,
        ).transpose(1, 2)
        lengths = torch.tensor([len(q) for q in queries], device=query_L.device)
        real = torch.arange(padded.shape[1], device=query_L.device) < lengths.unsqueeze(1)
        outputs.append(padded[real])
    return torch.cat(outputs)


def _batches_of_similar_length(spans: Sequence[Span]) -> list[list[Span]]:
    """Cut the spans, in order, into runs whose padding at most doubles their keys."""
    batches: list[list[Span]] = []
    real = longest = 0
    for span in spans:
        length = len(span.keys)
        longest, real = max(longest, length), real + length
        if batches and longest * (len(batches[-1]) + 1) <= 2 * real:
            batches[-1].append(span)
        else:
            batches.append([span])
            longest = real = length
    return batches


def _padded_index(ranges: Sequence[range], device: torch.device) -> Tensor:
    """Return [n, longest] positions; those past the end of a range repeat its last one."""
    firsts_n, lasts_n = torch.tensor([[r[0], r[-1]] for r in ranges], device=device).unbind(1)
    within = torch.arange(max(map(len, ranges)), device=device)
    return torch.minimum(firsts_n.unsqueeze(1) + within, lasts_n.unsqueeze(1))


def _causal_mask(queries: Sequence[range], keys: Sequence[range], device: torch.device) -> Tensor:
    """Return [n, 1, queries, keys] bool: the last query sees the last key, earlier ones less."""
    ahead_n = torch.tensor(
        [len(k) - len(q) for q, k in zip(queries, keys, strict=True)], device=device
    )
    query = torch.arange(max(map(len, queries)), device=device).unsqueeze(1)
    key = torch.arange(max(map(len, keys)), device=device)
    return (key <= query + ahead_n.view(-1, 1, 1)).unsqueeze(1)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark by which Megatron sums its gradient under sequence
    parallelism (finalize_model_grads.py:354); torch_norm.py:33 refuses that case."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore


class LocalSpec(LocalSpecProvider):
    """Megatron's local modules with this file's norm and attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return PackedAttention


def local_block_spec(
    config: TransformerConfig, moe_layers: Sequence[int], vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Return the layer specs of this pipeline stage without Transformer Engine.

    Args:
        config: Megatron's model config.
        moe_layers: 1 for each layer of the whole model whose MLP is a mixture of experts, else 0.
        vp_stage: virtual pipeline stage, None without one.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [_layer_spec(config, bool(is_moe)) for is_moe in moe_layers[first : first + count]]
    final_norm: Any = RMSNorm  # a class where the annotation says module
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def _layer_spec(config: TransformerConfig, is_moe: bool) -> ModuleSpec:
    bias_dropout_add: Any = get_bias_dropout_add  # a function where the annotation says type
    backend = LocalSpec()
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = get_mlp_module_spec_for_backend(
        backend=backend,
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=False,
    )
    # Transformer Engine's names, so that checkpoints written with and without it interchange;
    # its MoE layers keep pre_mlp_layernorm apart.
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not is_moe:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(),
            self_attention=attention,
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm(),
            mlp=mlp,
            mlp_bda=bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )
