"""DeepSeek-V2: latent attention, softmax routing whose weights are scaled, shared experts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mcore_rl.models.latent_attention import LatentAttentionFamily
from mcore_rl.models.moe import (
    check_group_limit,
    group_limit,
    shared_and_routed_sizes,
    softmax_routing,
)
from mcore_rl.models.spec import MODEL_FAMILIES, require_field


class DeepseekV2(LatentAttentionFamily):
    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        require_field(not config.mlp_bias, "mlp_bias", config.mlp_bias, "is not supported")
        normalized, method = config.norm_topk_prob, config.topk_method
        require_field(
            not normalized, "norm_topk_prob", normalized, "is not what transformers computes"
        )
        require_field(
            method in ("greedy", "group_limited_greedy"),
            "topk_method",
            method,
            "is neither greedy nor group_limited_greedy",
        )
        if method == "group_limited_greedy":
            check_group_limit(config, experts_per_group_score=1)

    def moe_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        grouped = config.topk_method == "group_limited_greedy"
        return {
            **shared_and_routed_sizes(config),
            **softmax_routing(topk=config.num_experts_per_tok, normalized=False),
            "moe_router_topk_scaling_factor": config.routed_scaling_factor,
            **(group_limit(config) if grouped else {}),
        }

    def engine_overrides(self, config: PreTrainedConfig) -> dict[str, Any]:
        # vLLM chooses groups first wherever there are some, whatever topk_method says.
        greedy = config.topk_method == "greedy"
        return {"n_group": 1, "topk_group": 1} if greedy else {}


MODEL_FAMILIES.add("deepseek_v2", DeepseekV2())
