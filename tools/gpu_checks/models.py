"""Models with random weights, and the tokens that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from gpu_checks.sizes import TINY, Sizes, qwen3, qwen3_moe
from mcore_rl.algorithms.losses import PolicyLossConfig
from mcore_rl.algorithms.objective import ObjectiveConfig, resolve_objective
from mcore_rl.algorithms.objectives import PolicyObjective
from mcore_rl.types import TokenSequence

disable_progress_bar()


def parity_models(sizes: Sizes) -> dict[str, PreTrainedConfig]:
    """Return the models of the checks of numbers, by family."""
    hidden = sizes.parity_hidden
    shape = TINY | {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": hidden}
    return {"dense": qwen3(**shape), "moe": qwen3_moe(**shape | experts)}


def save_random_model(config: PreTrainedConfig, folder: Path, device: torch.device) -> None:
    """Write a model whose every norm counts and whose logits spread over a few units."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.normal_(1.0, 0.1)
            else:
                param.normal_(0.0, 1.5 * param.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def sequences_of(lengths: Sequence[int], vocab_size: int) -> list[TokenSequence]:
    """Return random sequences of which all tokens but the first train, with an advantage each."""
    generator = torch.Generator().manual_seed(1)
    return [
        TokenSequence(
            token_ids=torch.randint(vocab_size, (length,), generator=generator).int().numpy(),
            loss_mask=np.arange(length) > 0,
            advantages=torch.randn(1, generator=generator).repeat(length).numpy(),
        )
        for length in lengths
    ]


def gmpo() -> PolicyObjective:
    """Return the objective of GMPO, as the loop makes it."""
    config = ObjectiveConfig(policy_loss=PolicyLossConfig(loss_mode="geo_mean"))
    return PolicyObjective(spec=resolve_objective(config, 4096), log_entropy=True)
