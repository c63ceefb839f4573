"""GRPO: rewards relative to the other samples of the same prompt.

    A = (r - mean_G) / (std_G + 1e-6)        std_G unbiased
    A = r - mean_G                           norm_adv_by_std_in_grpo=False (Dr.GRPO)

Source: DeepSeekMath, arXiv:2402.03300, section 4.1.2; Dr.GRPO, arXiv:2503.20783.
Shapes: N samples, P groups, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AdvantageInputs

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-6


@dataclass(kw_only=True, slots=True)
class GrpoConfig:
    """Options of grpo and grpo_passk."""

    norm_adv_by_std_in_grpo: bool = True
    """Divide by the group's standard deviation; False is Dr.GRPO."""


@ADVANTAGES.register("grpo", config=GrpoConfig, min_group_size=2)
def grpo(inputs: AdvantageInputs, cfg: GrpoConfig) -> Tensor:
    """Return the group-relative advantage of each token's sample, [T] float64."""
    advantages_N = inputs.centered_rewards_N
    if cfg.norm_adv_by_std_in_grpo:
        advantages_N = advantages_N / (inputs.std_P + EPSILON)[inputs.group_N]
    return inputs.segments.expand(advantages_N)
