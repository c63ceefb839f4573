"""Qwen3, dense: a norm on each query and key head, no biases."""

from __future__ import annotations

from transformers import PreTrainedConfig

from mcore_rl.models.decoder import DecoderFamily, check_no_attention_bias
from mcore_rl.models.spec import MODEL_FAMILIES, QkNorm


class Qwen3(DecoderFamily):
    def qk_norm(self, config: PreTrainedConfig) -> QkNorm:
        return "head"

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        check_no_attention_bias(config)


MODEL_FAMILIES.add("qwen3", Qwen3())
