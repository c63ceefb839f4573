"""Qwen2 and Qwen2.5, dense: biases on the query, key and value projections."""

from __future__ import annotations

from transformers import PreTrainedConfig

from mcore_rl.models.decoder import DecoderFamily
from mcore_rl.models.spec import MODEL_FAMILIES, require_field


class Qwen2(DecoderFamily):
    def has_qkv_bias(self, config: PreTrainedConfig) -> bool:
        return True

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        # Not a field of Qwen2Config: transformers keeps it, and builds the biases all the same.
        bias = getattr(config, "attention_bias", True)
        require_field(bias, "attention_bias", bias, "contradicts Qwen2, which has biases")


MODEL_FAMILIES.add("qwen2", Qwen2())
