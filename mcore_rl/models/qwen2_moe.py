"""Qwen2-MoE: Qwen2's attention; experts in place of the MLP in all or some of the layers, beside
them a shared expert scaled by a sigmoid gate of the token."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mcore_rl.models.moe import MoeFamily, check_softmax_routing, softmax_routing
from mcore_rl.models.spec import MODEL_FAMILIES


class QwenMoe(MoeFamily):
    """What Qwen2-MoE and Qwen3-MoE have in common: which layers have experts, and the router."""

    def is_moe(self, config: PreTrainedConfig, layer: int) -> bool:
        return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        check_softmax_routing(topk=config.num_experts_per_tok, normalized=config.norm_topk_prob)

    def moe_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "num_moe_experts": config.num_experts,
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            **softmax_routing(topk=config.num_experts_per_tok, normalized=config.norm_topk_prob),
        }


class Qwen2Moe(QwenMoe):
    hf_shared = "shared_expert"

    def has_qkv_bias(self, config: PreTrainedConfig) -> bool:
        return config.qkv_bias

    def moe_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        return super().moe_kwargs(config) | {
            "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
        }


MODEL_FAMILIES.add("qwen2_moe", Qwen2Moe())
