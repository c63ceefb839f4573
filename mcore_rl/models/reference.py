"""The model of a folder in transformers, as what Megatron and vLLM are compared with.

Its attention is the eager one. One number is not as transformers has it: the epsilon of the norms
inside multi-head latent attention; `build_reference` says why. Weights are as they are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mcore_rl.models.spec import load_hf_config

_LATENT_NORMS = ("q_a_layernorm", "kv_a_layernorm")


def build_reference(folder: str | Path, dtype: torch.dtype) -> Any:
    """Return the causal language model of a folder, on the CPU.

    The norms of compressed queries, keys and values get `rms_norm_eps`. The modelling code that
    DeepSeek publishes with its weights, and transformers after it, always builds them with the
    default of 1e-6. In DeepSeek-V2 and V3 that is `rms_norm_eps` too, so nothing tells which was
    meant; Moonlight, which has that code and 1e-5, is where they part. Megatron and vLLM give every
    norm `rms_norm_eps`. This project trains with the one and generates with the other, so it sides
    with them, and what is compared tells errors from this choice.

    Args:
        folder: model folder.
        dtype: of the weights.
    """
    from transformers import AutoModelForCausalLM  # seconds, so only when needed

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=load_hf_config(folder),
        dtype=dtype,
        attn_implementation="eager",
        trust_remote_code=False,
    )
    for name, module in model.named_modules():
        if name.endswith(_LATENT_NORMS):
            module.variance_epsilon = model.config.rms_norm_eps
    return model
