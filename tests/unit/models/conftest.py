"""Tiny configurations of every family, with an odd vocabulary and fewer key than query heads."""

import pytest
from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
MOE_SIZES = SIZES | {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
}
CASES = {
    "qwen2": (Qwen2Config, SIZES),
    "qwen2_tied": (Qwen2Config, SIZES | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, SIZES | {"head_dim": 8}),
    "qwen3_moe": (Qwen3MoeConfig, MOE_SIZES),
    "qwen3_moe_mixed": (
        Qwen3MoeConfig,
        MOE_SIZES | {"mlp_only_layers": [1], "decoder_sparse_step": 2},  # experts in layer 3 only
    ),
}


@pytest.fixture
def make_config():
    """Return a function (case, **overrides) -> configuration."""

    def make(case: str, **overrides) -> PreTrainedConfig:
        config_class, sizes = CASES[case]
        return config_class(**sizes | overrides)

    return make


@pytest.fixture(params=CASES)
def hf_config(request, make_config) -> PreTrainedConfig:
    return make_config(request.param)
