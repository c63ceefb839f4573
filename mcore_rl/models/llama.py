"""Llama 2 and 3: no biases, no norms on heads; Llama 3.1 and later with their own rope scaling."""

from __future__ import annotations

from transformers import PreTrainedConfig

from mcore_rl.models.decoder import DecoderFamily, check_no_attention_bias
from mcore_rl.models.spec import MODEL_FAMILIES, require_field


class Llama(DecoderFamily):
    def check(self, config: PreTrainedConfig) -> None:
        super().check(config)
        check_no_attention_bias(config)
        require_field(not config.mlp_bias, "mlp_bias", config.mlp_bias, "is not supported")


MODEL_FAMILIES.add("llama", Llama())
