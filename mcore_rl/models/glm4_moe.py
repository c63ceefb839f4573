"""GLM-4.5 and 4.6: leading dense layers, then experts routed as in DeepSeek-V3, with shared ones.

Query and key are rotated in part; biases on their projections and norms on their heads are options.
Hub checkpoints hold a layer for multi-token prediction after the last decoder layer: like in
transformers it is not loaded, and exports do not have it.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mcore_rl.models.moe import (
    MoeFamily,
    check_sigmoid_routing,
    shared_and_routed_sizes,
    sigmoid_routing,
)
from mcore_rl.models.spec import MODEL_FAMILIES, QkNorm


class Glm4Moe(MoeFamily):
    partial_rotary = True

    def has_qkv_bias(self, config: PreTrainedConfig) -> bool:
        return config.attention_bias

    def qk_norm(self, config: PreTrainedConfig) -> QkNorm:
        return "head" if config.use_qk_norm else "none"

    def is_moe(self, config: PreTrainedConfig, layer: int) -> bool:
        return layer >= config.first_k_dense_replace

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        check_sigmoid_routing(config)

    def moe_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        return shared_and_routed_sizes(config) | sigmoid_routing(config)

    def unused_prefixes(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return (f"model.layers.{config.num_hidden_layers}.",)


MODEL_FAMILIES.add("glm4_moe", Glm4Moe())
