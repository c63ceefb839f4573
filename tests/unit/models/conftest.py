"""Tiny configurations of every family, with an odd vocabulary and fewer key than query heads."""

import pytest
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

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
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
}
# Routed as in DeepSeek-V3.
GROUPED_SIZES = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "moe_intermediate_size": 8,
}
LATENT_SIZES = (
    SIZES
    | GROUPED_SIZES
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
    }
)
CASES = {
    "deepseek_v3": (DeepseekV3Config, LATENT_SIZES),
    "moonlight": (
        DeepseekV3Config,
        LATENT_SIZES | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v2": (DeepseekV2Config, LATENT_SIZES | {"topk_method": "greedy"}),
    "llama": (LlamaConfig, SIZES),
    "mixtral": (MixtralConfig, SIZES | {"num_local_experts": 4}),
    "qwen2_moe": (Qwen2MoeConfig, MOE_SIZES | {"shared_expert_intermediate_size": 12}),
    "glm4_moe": (
        Glm4MoeConfig,
        SIZES | GROUPED_SIZES | {"head_dim": 8, "use_qk_norm": True, "attention_bias": True},
    ),
    "qwen2": (Qwen2Config, SIZES),
    "qwen2_tied": (Qwen2Config, SIZES | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, SIZES | {"head_dim": 8}),
    "qwen3_moe": (Qwen3MoeConfig, MOE_SIZES | {"head_dim": 8}),
    "qwen3_moe_mixed": (
        Qwen3MoeConfig,
        # Experts in layer 3 only.
        MOE_SIZES | {"head_dim": 8, "mlp_only_layers": [1], "decoder_sparse_step": 2},
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
