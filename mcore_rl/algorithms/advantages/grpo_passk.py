"""Pass@k: only the best sample of a group trains, by how far it leads the second best.

    A = (r_best - r_second) / (std_G + 1e-6)     for the best sample, 0 for all others
    A = r_best - r_second                        norm_adv_by_std_in_grpo=False

Source: arXiv:2503.19595. Shapes: N samples, P groups, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AdvantageInputs
from mcore_rl.algorithms.advantages.grpo import EPSILON, GrpoConfig
from mcore_rl.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@ADVANTAGES.register("grpo_passk", config=GrpoConfig, min_group_size=2)
def grpo_passk(inputs: AdvantageInputs, cfg: GrpoConfig) -> Tensor:
    """Return the advantage of each token's sample, [T] float64; groups have at least 2 samples."""
    # Samples by group, and within a group by reward, the best first.
    order_N = inputs.rewards_N.argsort(descending=True)
    order_N = order_N[inputs.group_N[order_N].argsort(stable=True)]
    best_P = inputs.group_size_P.cumsum(0) - inputs.group_size_P
    winner_P, second_P = order_N[best_P], order_N[best_P + 1]
    advantages_N = torch.zeros_like(inputs.rewards_N)
    advantages_N[winner_P] = inputs.rewards_N[winner_P] - inputs.rewards_N[second_P]
    if cfg.norm_adv_by_std_in_grpo:
        advantages_N = advantages_N / (inputs.std_P + EPSILON)[inputs.group_N]
    return inputs.segments.expand(advantages_N)
