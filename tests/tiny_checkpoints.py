"""Tiny checkpoints of every family, with random weights that leave no parameter without effect.

transformers initializes biases to 0 and norms to 1, so a bias that is dropped or a norm that is
skipped would change nothing; here both are drawn. Matrices are drawn so that activations keep
their size and logits spread over a few units. The vocabulary is odd, key heads are fewer than
query heads, the head size is not hidden_size / heads where the family allows it, and rope_theta
and the norm's epsilon are not the defaults.
"""

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

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
}
CHECKPOINTS = {
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


def save_tiny_checkpoint(name, folder, seed=0):
    """Write the checkpoint `name` into `folder` and return it as a transformers model."""
    config_class, sizes = CHECKPOINTS[name]
    model = AutoModelForCausalLM.from_config(config_class(**sizes), attn_implementation="eager")
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
    model.save_pretrained(folder)
    return model.eval()
