"""Layers for Megatron's local spec that need neither Transformer Engine nor CUDA.

`PackedAttention` is causal grouped-query attention over packed sequences (the "thd" format) by
torch's scaled-dot-product attention; `RMSNorm` carries the sequence-parallel mark that Megatron's
own wrapper refuses to give. `local_block_spec` puts both into the local spec. Both are neutral to
the device; context parallelism is refused here until its rows are gathered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

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
        assert config.context_parallel_size == 1, "context parallelism is not implemented here"
        assert not config.attention_dropout, "attention dropout is not implemented here"
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)

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
        """Return [T, heads * d], attention within each packed sequence.

        `query` is [T, heads, d], `key` and `value` are [T, groups, d], of any float dtype;
        `packed_seq_params` holds the boundaries ("thd" format). The signature is Megatron's.
        """
        assert packed_seq_params is not None and attention_mask is None, "packed rows only"
        boundaries = packed_seq_params.cu_seqlens_q_padded
        if boundaries is None:
            boundaries = packed_seq_params.cu_seqlens_q
        out = packed_causal_attention(query, key, value, boundaries.tolist(), self.scale)
        return out.flatten(-2)


def packed_causal_attention(
    query_T: Tensor, key_T: Tensor, value_T: Tensor, boundaries: list[int], scale: float
) -> Tensor:
    """Return causal attention of each sequence to itself, [T, heads, d].

    Neighbouring sequences of similar length are padded to one batch: right padding cannot reach
    earlier tokens through a causal mask, and the padded rows are dropped.

    Args:
        query_T: [T, heads, d] float.
        key_T: [T, groups, d] float; groups divides heads.
        value_T: as `key_T`.
        boundaries: cumulative lengths, first 0, last T.
        scale: factor on the scores.
    """
    outputs = []
    grouped = query_T.shape[1] != key_T.shape[1]
    for batch in _batches_of_similar_length(boundaries):
        lengths = [stop - start for start, stop in batch]
        first, last, longest = batch[0][0], batch[-1][1], max(lengths)
        index = _padded_index(lengths, longest, query_T.device)
        query, key, value = (
            x[first:last][index].transpose(1, 2) for x in (query_T, key_T, value_T)
        )
        padded = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        ).transpose(1, 2)
        if min(lengths) == longest:
            outputs.append(padded.flatten(0, 1))
        else:
            real = torch.arange(longest, device=index.device) < torch.tensor(
                lengths, device=index.device
            ).unsqueeze(1)
            outputs.append(padded[real])
    return torch.cat(outputs)


def _batches_of_similar_length(boundaries: list[int]) -> list[list[tuple[int, int]]]:
    """Cut the sequences, in order, into runs whose padding at most doubles their tokens."""
    batches: list[list[tuple[int, int]]] = []
    real = longest = 0
    for start, stop in itertools.pairwise(boundaries):
        length = stop - start
        if length == 0:
            continue
        longest, real = max(longest, length), real + length
        if batches and longest * (len(batches[-1]) + 1) <= 2 * real:
            batches[-1].append((start, stop))
        else:
            batches.append([(start, stop)])
            longest = real = length
    return batches


def _padded_index(lengths: list[int], longest: int, device: torch.device) -> Tensor:
    """Return [n, longest] row numbers; rows past the end of a sequence repeat its last one."""
    lengths_n = torch.tensor(lengths, device=device)
    starts_n = lengths_n.cumsum(0) - lengths_n
    within = torch.arange(longest, device=device).unsqueeze(0)
    return starts_n.unsqueeze(1) + torch.minimum(within, lengths_n.unsqueeze(1) - 1)


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
