"""Tiny checkpoints of every family, with random weights that leave no parameter without effect.

transformers initializes biases to 0 and norms to 1, so a bias that is dropped or a norm that is
skipped would change nothing; here both are drawn. Matrices are drawn so that activations keep
their size and logits spread over a few units. The vocabulary is odd, key heads are fewer than
query heads, the head size is not hidden_size / heads where the family allows it, and rope_theta
and the norm's epsilon are not the defaults.
"""

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
QWEN3 = SIZES | {"head_dim": 16}
MOE = QWEN3 | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.5,  # belongs to pretraining: must change nothing
}
# Scaled so strongly that it counts within a few positions.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Routed as in DeepSeek-V3: two of four groups, then four of their six experts; dense layer first.
GROUPED = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "moe_intermediate_size": 24,
}
# Four sizes of heads, all different; transformers fixes the epsilon of the inner norms.
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rms_norm_eps": 1e-6,
}
LATENT_YARN = YARN | {"mscale": 0.8, "mscale_all_dim": 1.2}
CHECKPOINTS = {
    "llama": (
        LlamaConfig,
        SIZES
        | {
            "rope_parameters": LLAMA3,
            "num_hidden_layers": 5,  # of which no pipeline has equal stages
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": (MixtralConfig, SIZES | {"num_local_experts": 4, "num_hidden_layers": 3}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        SIZES
        | {
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
        },
    ),
    "glm4_moe": (
        Glm4MoeConfig,
        QWEN3
        | GROUPED
        | {
            "attention_bias": True,
            "use_qk_norm": True,
            "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
    ),
    "deepseek_v3": (DeepseekV3Config, LATENT | GROUPED | {"rope_parameters": LATENT_YARN}),
    "moonlight": (
        DeepseekV3Config,
        LATENT | GROUPED | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v2": (
        DeepseekV2Config,
        LATENT | GROUPED | {"topk_method": "group_limited_greedy", "topk_group": 4, "n_group": 6},
    ),
    "qwen3_yarn": (Qwen3Config, QWEN3 | {"rope_parameters": YARN}),
    "qwen3_linear": (
        Qwen3Config,
        QWEN3 | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    ),
    "qwen2": (Qwen2Config, SIZES),
    "qwen2_tied": (Qwen2Config, SIZES | {"tie_word_embeddings": True, "num_hidden_layers": 4}),
    "qwen3": (Qwen3Config, QWEN3),
    "qwen3_one_group": (Qwen3Config, QWEN3 | {"num_key_value_heads": 1}),
    "qwen3_moe": (Qwen3MoeConfig, MOE),
    "qwen3_moe_four_layers": (
        Qwen3MoeConfig,
        MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    ),
    "qwen3_moe_mixed": (Qwen3MoeConfig, MOE | {"mlp_only_layers": [0]}),
    "qwen3_moe_unnormalized": (Qwen3MoeConfig, MOE | {"norm_topk_prob": False}),
}


def save_tiny_checkpoint(name, folder, seed=0, **sizes):
    """Write the checkpoint `name`, with other sizes if given, into `folder` and return it as a
    transformers model."""
    config_class, usual_sizes = CHECKPOINTS[name]
    config = config_class(**usual_sizes | sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in parameter_name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1 or "embed" in parameter_name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()
