"""Mixtral: experts in every layer, the weights of the chosen ones renormalized."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mcore_rl.models.moe import MoeFamily, check_softmax_routing, softmax_routing
from mcore_rl.models.spec import MODEL_FAMILIES, require_field


class Mixtral(MoeFamily):
    hf_block = "block_sparse_moe"
    hf_expert = ("w1", "w3", "w2")

    def is_moe(self, config: PreTrainedConfig, layer: int) -> bool:
        return True

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        check_softmax_routing(topk=config.num_experts_per_tok, normalized=True)
        noise = config.router_jitter_noise
        require_field(not noise, "router_jitter_noise", noise, "must be 0: RL adds no noise")

    def moe_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        return {
            "num_moe_experts": config.num_local_experts,
            "moe_ffn_hidden_size": config.intermediate_size,
            **softmax_routing(topk=config.num_experts_per_tok, normalized=True),
        }


MODEL_FAMILIES.add("mixtral", Mixtral())
