"""How large the checks are: on a device, and small on CPU, where they test the checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, Qwen3Config, Qwen3MoeConfig


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the checks are."""

    parity_hidden: int
    parity_lengths: tuple[int, ...]
    attention_lengths: tuple[int, ...]
    """Multiples of 4, for context parallelism over two ranks."""
    logprob_vocab: int
    logprob_tokens: int
    logprob_hidden: int
    dense: PreTrainedConfig
    moe: PreTrainedConfig
    many_experts: PreTrainedConfig
    step_lengths: tuple[int, ...]
    """Tokens of the sequences of one update."""
    step_micro_batch: int
    """Sequences of a micro-batch."""
    engine_dtype: str
    """Of trainer and engine beside each other."""
    engine_dense: PreTrainedConfig
    engine_moe: PreTrainedConfig
    prompt_lengths: tuple[int, ...]
    response_length: int
    engine: dict[str, Any]
    """Settings of `rollout`."""
    run_model: dict[str, int]
    """Options of examples/quickstart/make_model.py."""
    run: tuple[str, ...]
    """Overrides of a run."""


def qwen3(**sizes: Any) -> Qwen3Config:
    """Return a Qwen3 config; what is left out is Qwen3-0.6B's."""
    shape = {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    }
    return Qwen3Config(**(shape | sizes))


def qwen3_moe(**sizes: Any) -> Qwen3MoeConfig:
    """Return a small mixture of experts: 1.3 B parameters, of which 0.5 B act on a token."""
    shape = qwen3().to_dict() | {
        "num_hidden_layers": 12,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    }
    shape.pop("model_type", None)
    shape.pop("layer_types", None)
    return Qwen3MoeConfig(**(shape | sizes))


TINY: Any = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
}
_TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# vLLM's attention on CPU takes no smaller heads.
_TINY_ENGINE = TINY | {"head_dim": 32}

SIZES = {
    "cuda": Sizes(
        parity_hidden=512,
        parity_lengths=(300, 17, 1024, 2, 128, 511),
        attention_lengths=(1024, 4, 2048, 512, 36),
        logprob_vocab=151_936,
        logprob_tokens=8192,
        logprob_hidden=1024,
        dense=qwen3(),
        moe=qwen3_moe(),
        many_experts=qwen3_moe(
            hidden_size=2048,
            num_hidden_layers=2,
            num_attention_heads=32,
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
        ),
        step_lengths=(2048,) * 16,
        step_micro_batch=4,
        engine_dtype="bfloat16",
        engine_dense=qwen3(),
        engine_moe=qwen3_moe(),
        prompt_lengths=(7, 64, 300, 17),
        response_length=64,
        engine={"gpu_memory_utilization": 0.3, "max_num_seqs": 64},
        run_model={"hidden-size": 256},
        run=("actor.megatron.dtype=bfloat16", "rollout.gpu_memory_utilization=0.2"),
    ),
    "cpu": Sizes(
        parity_hidden=32,
        parity_lengths=(13, 2, 21, 5),
        attention_lengths=(16, 4, 32, 12),
        logprob_vocab=1000,
        logprob_tokens=64,
        logprob_hidden=32,
        dense=qwen3(**TINY),
        moe=qwen3_moe(**TINY | _TINY_EXPERTS),
        many_experts=qwen3_moe(
            **TINY | {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 32}
        ),
        step_lengths=(32,) * 4,
        step_micro_batch=2,
        engine_dtype="float32",
        engine_dense=qwen3(**_TINY_ENGINE),
        engine_moe=qwen3_moe(**_TINY_ENGINE | _TINY_EXPERTS),
        prompt_lengths=(7, 12, 3, 5),
        response_length=8,
        engine={"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 8},
        run_model={
            "hidden-size": 64,
            "intermediate-size": 64,
            "heads": 2,
            "kv-heads": 1,
            "experts": 4,
            "moe-intermediate-size": 32,
            "max-position-embeddings": 64,
        },
        run=("actor.megatron.dtype=float32", "rollout.kv_cache_memory_bytes=33554432"),
    ),
}
