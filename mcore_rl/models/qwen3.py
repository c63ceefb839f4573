"""Qwen3, dense: a norm on each query and key head, no biases."""

from __future__ import annotations

from transformers import PreTrainedConfig

from mcore_rl.models.decoder import DecoderFamily
from mcore_rl.models.spec import MODEL_FAMILIES, require_field


class Qwen3(DecoderFamily):
    qk_norm = True

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        # It would also put a bias on o_proj, which Megatron cannot do without one on the MLP.
        bias = config.attention_bias
        require_field(not bias, "attention_bias", bias, "is not supported for Qwen3")


MODEL_FAMILIES.add("qwen3", Qwen3())
