"""DeepSeek-V3, R1 and Moonlight: latent attention, sigmoid routing with biases, shared experts.

Hub checkpoints of DeepSeek-V3 hold a layer for multi-token prediction after the last decoder layer:
like in transformers it is not loaded, and exports do not have it. Its weights are in FP8, which is
refused: convert them to bfloat16 first.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mcore_rl.models.latent_attention import LatentAttentionFamily
from mcore_rl.models.moe import check_sigmoid_routing, shared_and_routed_sizes, sigmoid_routing
from mcore_rl.models.spec import MODEL_FAMILIES, require_field

_ONLY = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
"""Fields of the original code that transformers keeps and neither reads nor writes of itself."""


class DeepseekV3(LatentAttentionFamily):
    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        check_sigmoid_routing(config)
        interleave = config.rope_interleave
        require_field(interleave, "rope_interleave", interleave, "is not supported by Megatron")
        for field, only in _ONLY.items():
            value = getattr(config, field, only)
            require_field(
                value == only, field, value, f"is not {only}, the only one of this family"
            )

    def moe_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        return shared_and_routed_sizes(config) | sigmoid_routing(config)

    def engine_overrides(self, config: PreTrainedConfig) -> dict[str, Any]:
        # Without them, as transformers writes it, vLLM has no biases and a softmax in the router
        # (vllm/model_executor/models/deepseek_v2.py, DeepseekV2MoE).
        return dict(_ONLY)

    def unused_prefixes(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return (f"model.layers.{config.num_hidden_layers}.",)


MODEL_FAMILIES.add("deepseek_v3", DeepseekV3())
