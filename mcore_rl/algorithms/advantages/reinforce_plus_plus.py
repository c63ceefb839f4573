"""REINFORCE++: the discounted reward of each token, whitened over the whole batch, without groups.

    R_t = gamma^(trained tokens of the sample after t) * r,      A = whiten(R)

Source: arXiv:2501.03262. There the KL penalty of each token is a reward of that token; here it is
part of r (`kl_in_reward.py`). Shapes: N samples, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AdvantageInputs
from mcore_rl.algorithms.advantages.whiten import whiten
from mcore_rl.errors import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class ReinforcePlusPlusConfig:
    """Options of reinforce_plus_plus."""

    gamma: float = 1.0
    """Discount per token."""

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "algorithm.gamma", self.gamma, "must be in [0, 1]")


@ADVANTAGES.register("reinforce_plus_plus", config=ReinforcePlusPlusConfig)
def reinforce_plus_plus(inputs: AdvantageInputs, cfg: ReinforcePlusPlusConfig) -> Tensor:
    """Return the whitened return of each token, [T] float64."""
    segments = inputs.segments
    later_T = segments.expand(segments.num_tokens_S.cumsum(0)) - segments.mask_T.cumsum(0)
    returns_T = segments.expand(inputs.rewards_N) * cfg.gamma**later_T
    return whiten(returns_T, segments.mask_T)
