"""Qwen3-MoE: Qwen3's attention; experts in place of the MLP in all or some of the layers."""

from __future__ import annotations

from transformers import PreTrainedConfig

from mcore_rl.models.decoder import check_no_attention_bias
from mcore_rl.models.qwen2_moe import QwenMoe
from mcore_rl.models.spec import MODEL_FAMILIES, QkNorm


class Qwen3Moe(QwenMoe):
    def qk_norm(self, config: PreTrainedConfig) -> QkNorm:
        return "head"

    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        check_no_attention_bias(config)


MODEL_FAMILIES.add("qwen3_moe", Qwen3Moe())
