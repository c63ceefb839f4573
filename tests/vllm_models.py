"""Tiny models that vLLM can run on CPU, as transformers makes them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

# vLLM's CPU attention wants heads of 32; qwen2 has them as hidden_size / heads.
SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
QWEN3 = SIZES | {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
MOE = QWEN3 | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
# Queries of several heads, which vLLM's rotary kernel misreads on CPU. Without scoring_func and
# topk_method in the configuration of V3, as transformers writes it.
LATENT = SIZES | {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 48,
    "routed_scaling_factor": 1.5,
    "eos_token_id": None,
}
MODELS = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**QWEN3),
    "qwen3_tied": Qwen3Config(**QWEN3, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**MOE),
    "qwen3_moe_mixed": Qwen3MoeConfig(**MOE | {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    # Experts called otherwise.
    "mixtral": MixtralConfig(**SIZES | {"num_local_experts": 4, "eos_token_id": None}),
    # Biases of routers, shared experts, a dense layer first.
    "glm4_moe": Glm4MoeConfig(
        **QWEN3
        | {
            "attention_bias": True,
            "use_qk_norm": True,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "moe_intermediate_size": 48,
            "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
        }
    ),
    "deepseek_v2": DeepseekV2Config(
        **LATENT
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 4,
            "q_lora_rank": None,
        }
    ),
    # Groups that greedy choice is to pass over.
    "deepseek_v2_greedy": DeepseekV2Config(
        **LATENT | {"topk_method": "greedy", "n_group": 4, "topk_group": 2}
    ),
    "deepseek_v3": DeepseekV3Config(**LATENT | {"n_group": 4, "topk_group": 2}),
    "deepseek_v3_yarn": DeepseekV3Config(
        **LATENT
        | {
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 0.8,
                "mscale_all_dim": 1.2,
            },
        }
    ),
}


def make_model(name: str, seed: int) -> Any:
    """Return a model in which no parameter is without effect and logits spread over some units."""
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in parameter_name else 0.0))
            elif "embed" in parameter_name:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(1.5 * noise * parameter.shape[-1] ** -0.5)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.float().eval()


@torch.no_grad()
def hf_router_logits(model: Any, token_ids: list[int], routes: torch.Tensor) -> torch.Tensor:
    """Return what the routers of a Qwen3-MoE say of every token but the last, if all tokens go to
    the experts `routes`, [n - 1, MoE layers, topk] in any order: [n - 1, MoE layers, experts].
    """
    logits = []

    def take_route(router, _inputs, output):
        of_layer, _, own_choice = output
        chosen = routes[:, len(logits)]
        assert chosen.shape == own_choice.shape
        logits.append(of_layer)
        weights = of_layer.softmax(-1).gather(-1, chosen)
        return of_layer, weights / weights.sum(-1, keepdim=True), chosen

    routers = [m for m in model.modules() if isinstance(m, Qwen3MoeTopKRouter)]
    assert all(router.norm_topk_prob for router in routers)
    hooks = [router.register_forward_hook(take_route) for router in routers]
    try:
        model(torch.tensor([token_ids[:-1]]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(logits, dim=1)


@torch.no_grad()
def hf_logprobs(
    model: Any, prompt: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    """Return log_softmax(logits / temperature) of the R response tokens' predictions.

    [R, V] float32.
    """
    logits = model(torch.tensor([[*prompt, *response]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
