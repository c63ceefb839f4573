"""Whether syncs bring adapters by themselves or merged into the weights, decided before a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mcore_rl.config.run import RunConfig
from mcore_rl.errors import require
from mcore_rl.models.lora import adapted_layers, adapters_of, linear_weights
from mcore_rl.models.spec import load_hf_config, model_family, routing
from mcore_rl.rollout.base import EngineAdapters, RolloutConfig

logger = logging.getLogger(__name__)

MAX_RANK = 512
"""Of vLLM (config/lora.py, MaxLoRARanks)."""
SHOWN_LAYERS = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
)
"""Layers for which the tests show that vLLM's adapters compute the same as the trainer's."""


def why_merged(
    has_experts: bool, rank: int, layers: Sequence[str], rollout: RolloutConfig
) -> str | None:
    """Return why an engine cannot have the adapters beside the weights; None: it can.

    Args:
        has_experts: whether the model is a mixture of experts.
        rank: of the adapters.
        layers: last parts of the names of the adapted layers.
        rollout: the section.
    """
    if rollout.name != "vllm":
        return f"the engine {rollout.name} knows none"
    if rollout.host == "server":
        return "servers are started without adapters"
    if has_experts:
        # On CPU it started and failed at its first request when tried; elsewhere it was not.
        return "the model has experts, whose adapters vLLM does not run on every device"
    other = sorted(set(layers) - SHOWN_LAYERS)
    if other:
        return f"adapters of {', '.join(other)} have not been shown to agree"
    if rank > MAX_RANK:
        return f"model.lora_rank={rank} is more than vLLM's {MAX_RANK}"
    if rollout.sleep_level == 2:
        return "rollout.sleep_level=2 forgets the weights before every sync"
    return None


def adapters_of_engines(cfg: RunConfig) -> EngineAdapters | None:
    """Return the adapters that engines take in addition to the weights; None: none, or merged.

    Raises:
        UserError: if rollout.lora_sync=adapter asks for what cannot be.
    """
    lora, asked = cfg.model.lora, cfg.rollout.lora_sync
    if lora is None:
        return None
    hf_config = load_hf_config(cfg.model.folder)
    entries = model_family(hf_config).entries(hf_config)
    layers = adapted_layers(adapters_of(linear_weights(entries), lora.rank, lora.names))
    reason = why_merged(routing(hf_config) is not None, lora.rank, layers, cfg.rollout)
    fix = "Use merged or auto."
    require(
        asked != "adapter" or reason is None,
        "rollout.lora_sync",
        asked,
        f"cannot be: {reason}",
        fix,
    )
    if asked == "merged":
        reason = "rollout.lora_sync=merged"
    if reason is not None:
        logger.info("LoRA: syncs bring merged weights: %s", reason)
        return None
    logger.info("LoRA: syncs after the first bring the adapters alone")
    return EngineAdapters(rank=lora.rank, alpha=lora.alpha, layers=layers)
