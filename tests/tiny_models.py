"""Tiny models of every family: the one table from which the tests of families take their cases.

A new family is an entry in `MODELS`. Then, in real Megatron-Core, its logits and gradients are
compared with transformers', its weights go through layouts and files and come back bit by bit, its
names, shapes and arguments are checked; with `vllm`, vLLM draws with it after weight syncs.

The weights are random and leave no parameter without effect. transformers initializes biases to 0
and norms to 1, so a bias that is dropped or a norm that is skipped would change nothing; here both
are drawn. Matrices are drawn so that activations keep their size and logits spread over a few
units. The vocabulary is odd, key heads are fewer than query heads, the head size is not
hidden_size / heads where the family allows it, and rope_theta and the norm's epsilon are not the
defaults.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.actor_inputs import EP2, ETP1, PP2, TP2


@dataclass(frozen=True)
class TinyModel:
    """One entry of the table."""

    config_class: type[PreTrainedConfig]
    sizes: Mapping[str, Any]
    """Arguments of the class."""
    vllm: Mapping[str, Any] | None = None
    """Arguments that differ where vLLM runs the model on CPU; None: it does not."""
    layouts: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    """(world size, options of MegatronConfig) in which gradients are compared beside one process:
    where the family has something that others have not, and where it is cut or shared."""
    is_variant: bool = False
    """Of a family that another entry stands for: left out where the family alone matters."""
    model_type: str = ""
    """What config.json says in place of the class's."""


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
# What vLLM's kernels for CPU want: heads of 32, and not too few hidden units.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
WIDE_HEADS = WIDE | {"head_dim": 32}
# Heads of 32 as hidden_size / heads.
TWO_HEADS = WIDE | {"num_attention_heads": 2, "num_key_value_heads": 1}
WIDE_MOE = {"moe_intermediate_size": 48}
WIDE_GROUPED = {"n_routed_experts": 8, "moe_intermediate_size": 48}
# Queries of several heads, which vLLM's rotary kernel misreads on CPU.
WIDE_LATENT = WIDE | {
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "moe_intermediate_size": 48,
    "eos_token_id": None,
}
MODELS = {
    "llama": TinyModel(
        LlamaConfig,
        SIZES
        | {
            "rope_parameters": LLAMA3,
            "num_hidden_layers": 5,  # of which no pipeline has equal stages
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        vllm=TWO_HEADS | {"eos_token_id": None},
        layouts=((2, PP2),),
    ),
    "mistral": TinyModel(
        MistralConfig, QWEN3 | {"sliding_window": None}, vllm=WIDE_HEADS | {"eos_token_id": None}
    ),
    "mixtral": TinyModel(
        MixtralConfig,
        SIZES | {"num_local_experts": 4, "num_hidden_layers": 3},
        vllm=TWO_HEADS | {"eos_token_id": None},
    ),
    "olmoe": TinyModel(
        OlmoeConfig,
        SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": None},
        vllm=TWO_HEADS,
        layouts=((2, TP2 | EP2 | ETP1), (2, TP2)),
    ),
    "qwen2_moe": TinyModel(
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
        vllm=TWO_HEADS | WIDE_MOE | {"shared_expert_intermediate_size": 80},
        layouts=((2, TP2 | EP2 | ETP1),),
    ),
    "glm4_moe": TinyModel(
        Glm4MoeConfig,
        QWEN3
        | GROUPED
        | {
            "attention_bias": True,
            "use_qk_norm": True,
            "rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5},
        },
        vllm=WIDE_HEADS | WIDE_GROUPED | {"num_hidden_layers": 2},
        layouts=((2, TP2),),
    ),
    "deepseek_v3": TinyModel(
        DeepseekV3Config,
        LATENT | GROUPED | {"rope_parameters": LATENT_YARN},
        vllm=WIDE_LATENT
        | {"rope_parameters": LATENT_YARN | {"original_max_position_embeddings": 64}},
        layouts=((2, TP2 | EP2 | ETP1),),
    ),
    "moonlight": TinyModel(
        DeepseekV3Config,
        LATENT | GROUPED | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
        layouts=((2, TP2),),
    ),
    "kimi_k2": TinyModel(
        DeepseekV3Config,
        LATENT | GROUPED | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
        vllm=WIDE_LATENT,
        model_type="kimi_k2",
    ),
    "deepseek_v2": TinyModel(
        DeepseekV2Config,
        LATENT | GROUPED | {"topk_method": "group_limited_greedy", "topk_group": 4, "n_group": 6},
        vllm=WIDE_LATENT | {"n_group": 4, "q_lora_rank": None},
        layouts=((2, PP2),),
    ),
    # Groups that greedy choice is to pass over.
    "deepseek_v2_greedy": TinyModel(
        DeepseekV2Config,
        LATENT | GROUPED | {"topk_method": "greedy", "n_group": 4, "topk_group": 2},
        vllm=WIDE_LATENT,
        is_variant=True,
    ),
    "qwen3_yarn": TinyModel(Qwen3Config, QWEN3 | {"rope_parameters": YARN}, is_variant=True),
    "qwen3_linear": TinyModel(
        Qwen3Config,
        QWEN3 | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
        is_variant=True,
    ),
    "qwen2": TinyModel(Qwen2Config, SIZES, vllm=TWO_HEADS),
    "qwen2_tied": TinyModel(
        Qwen2Config, SIZES | {"tie_word_embeddings": True, "num_hidden_layers": 4}
    ),
    "qwen3": TinyModel(Qwen3Config, QWEN3, vllm=WIDE_HEADS),
    "qwen3_tied": TinyModel(
        Qwen3Config, QWEN3 | {"tie_word_embeddings": True}, vllm=WIDE_HEADS, is_variant=True
    ),
    "qwen3_one_group": TinyModel(Qwen3Config, QWEN3 | {"num_key_value_heads": 1}, is_variant=True),
    "qwen3_moe": TinyModel(Qwen3MoeConfig, MOE, vllm=WIDE_HEADS | WIDE_MOE),
    "qwen3_moe_four_layers": TinyModel(
        Qwen3MoeConfig,
        MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2},
        is_variant=True,
    ),
    "qwen3_moe_mixed": TinyModel(
        Qwen3MoeConfig,
        MOE | {"mlp_only_layers": [0]},
        vllm=WIDE_HEADS | WIDE_MOE | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
        is_variant=True,
    ),
    "qwen3_moe_unnormalized": TinyModel(
        Qwen3MoeConfig, MOE | {"norm_topk_prob": False}, is_variant=True
    ),
}


def tiny_config(name: str, **sizes: Any) -> PreTrainedConfig:
    """Return the configuration `name`, with other sizes if given."""
    model = MODELS[name]
    return model.config_class(**{**model.sizes, **sizes})


def make_tiny_model(config: PreTrainedConfig, seed: int = 0) -> Any:
    """Return transformers' model, of random weights, float32."""
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
    return model.float().eval()


def save_tiny_model(name: str, model: Any, folder: Path | str) -> None:
    """Write a model of the configuration `name`."""
    model.save_pretrained(folder)
    if model_type := MODELS[name].model_type:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": model_type}))


def save_tiny_checkpoint(name: str, folder: Path | str, seed: int = 0, **sizes: Any) -> Any:
    """Write the checkpoint `name`, with other sizes if given, into `folder` and return it as a
    transformers model."""
    model = make_tiny_model(tiny_config(name, **sizes), seed)
    save_tiny_model(name, model, folder)
    return model
