"""Rotary positions: `rope_parameters` of config.json as arguments of Megatron.

Megatron-Core 0.16.1 knows the plain form, positions divided by a factor (`linear`), YaRN
(arXiv:2309.00071) and the scaling of Llama 3, the last with three of its four numbers fixed.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mcore_rl.errors import require
from mcore_rl.models.spec import require_field

ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# RotaryEmbedding._apply_scaling in megatron/core/models/common/embeddings takes these as they are.
LLAMA3_CONSTANTS = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def check_rope(config: PreTrainedConfig, *, partial: bool = False) -> None:
    """Raise a UserError naming the field of `rope_parameters` that Megatron cannot express.

    Args:
        config: of any family.
        partial: whether the family may rotate only a part of each head.
    """
    rope = config.rope_parameters
    kind = rope["rope_type"]
    require_field(kind in ROPE_TYPES, "rope_type", kind, f"is none of {', '.join(ROPE_TYPES)}")
    fraction = rotary_fraction(config)
    require_field(
        fraction == 1 or (partial and kind != "yarn"), "partial_rotary_factor", fraction, "is not 1"
    )
    if kind == "llama3":
        for field, value in LLAMA3_CONSTANTS.items():
            require_field(rope[field] == value, field, rope[field], f"is not {value} for llama3")
    if kind == "yarn":
        check_yarn(config)


def check_yarn(config: PreTrainedConfig) -> None:
    """Raise a UserError naming the field of a YaRN scaling that Megatron cannot express."""
    rope = config.rope_parameters
    factor = rope.get("attention_factor")
    require_field(factor is None, "attention_factor", factor, "is not supported; leave it out")
    require_field(rope["factor"] is not None, "factor", None, "is missing for yarn")
    mscale, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    require_field(
        bool(mscale) or not of_all, "mscale", mscale, f"has to come with mscale_all_dim={of_all}"
    )


def max_positions(config: PreTrainedConfig) -> int:
    """Return the longest sequence that the model has positions for.

    YaRN scales positions from the original length on; where it is switched on as Qwen describes it,
    max_position_embeddings stays at that length.
    """
    rope = config.rope_parameters
    longest = config.max_position_embeddings
    if rope["rope_type"] == "yarn":
        scaled = int(rope["factor"] * rope["original_max_position_embeddings"])
        return max(longest, scaled)
    return longest


def check_length(config: PreTrainedConfig, length: int, key: str, fix: str = "") -> None:
    """Raise a UserError naming `key` if the model has no positions for sequences of `length`."""
    limit, name = max_positions(config), "max_position_embeddings"
    if limit > config.max_position_embeddings:
        name = "factor * original_max_position_embeddings"
    require(length <= limit, key, length, f"is more than {name}={limit} of the model", fix)


def rotary_fraction(config: PreTrainedConfig) -> float:
    """Return the part of each head that is rotated."""
    return config.rope_parameters.get("partial_rotary_factor", 1.0)


def gpt_rope_kwargs(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the arguments of Megatron's GPTModel that describe positions."""
    rope = config.rope_parameters
    kind = rope["rope_type"]
    kwargs = {
        "position_embedding_type": "yarn" if kind == "yarn" else "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rotary_fraction(config),
    }
    if kind == "linear":
        kwargs["seq_len_interpolation_factor"] = rope["factor"]
    if kind == "llama3":
        kwargs |= {"rope_scaling": True, "rope_scaling_factor": rope["factor"]}
    return kwargs


def yarn_numbers(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the numbers of a YaRN scaling under Megatron's names, without prefix.

    transformers takes `mscale` only together with `mscale_all_dim`; without them the factor on
    cosine and sine is what mscale = 1 and mscale_all_dim = 0 give.
    """
    rope = config.rope_parameters
    of_all = rope.get("mscale_all_dim") or 0.0
    return {
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        "mscale": rope["mscale"] if of_all else 1.0,
        "mscale_all_dim": of_all,
    }


def yarn_config_kwargs(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what a decoder without latent attention adds to Megatron's config for YaRN."""
    if config.rope_parameters["rope_type"] != "yarn":
        return {}
    numbers = yarn_numbers(config) | {
        "correction_range_round_to_int": config.rope_parameters.get("truncate", True)
    }
    return {f"yarn_{name}": value for name, value in numbers.items()}
