"""OLMoE: experts in every layer; queries and keys normalized over all heads together."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mcore_rl.models.decoder import check_no_attention_bias
from mcore_rl.models.moe import MoeFamily, check_softmax_routing, softmax_routing
from mcore_rl.models.spec import MODEL_FAMILIES, QkNorm, require_field


class Olmoe(MoeFamily):
    def qk_norm(self, config: PreTrainedConfig) -> QkNorm:
        return "whole"

    def is_moe(self, config: PreTrainedConfig, layer: int) -> bool:
        return True

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        check_no_attention_bias(config)
        check_softmax_routing(topk=config.num_experts_per_tok, normalized=config.norm_topk_prob)
        clip, eps = config.clip_qkv, config.rms_norm_eps
        require_field(clip is None, "clip_qkv", clip, "is not supported")
        rule = "is not 1e-05, with which vLLM normalizes queries and keys whatever stands here"
        require_field(eps == 1e-5, "rms_norm_eps", eps, rule)

    def moe_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "num_moe_experts": config.num_experts,
            "moe_ffn_hidden_size": config.intermediate_size,
            **softmax_routing(topk=config.num_experts_per_tok, normalized=config.norm_topk_prob),
        }

    def problem_of_tp(self, config: PreTrainedConfig, size: int) -> str:
        # Ranks that share a key head would each count it in the norm over all of them.
        groups = config.num_key_value_heads
        return f"is more than num_key_value_heads={groups}" if size > groups else ""


MODEL_FAMILIES.add("olmoe", Olmoe())
