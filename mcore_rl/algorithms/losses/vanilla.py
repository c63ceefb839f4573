"""PPO's clipped loss per token, with the dual clip; with GRPO's advantages it is GRPO and DAPO.

    r = exp(logprob - old_logprob)
    l = max(-A r, -A clip(r, 1 - low, 1 + high)),      and where A < 0: l = min(l, -A c)

Source: arXiv:1707.06347, eq. 7; dual clip: arXiv:1912.09729, eq. 5; low != high: DAPO,
arXiv:2503.14476. Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mcore_rl.algorithms.losses.base import POLICY_LOSSES, ClipConfig, PolicyLossInputs, TokenLoss
from mcore_rl.algorithms.ratio import probability_ratio
from mcore_rl.errors import require
from mcore_rl.lazy_torch import torch
from mcore_rl.metrics import masked_mean


@dataclass(kw_only=True)
class VanillaConfig(ClipConfig):
    """Options of vanilla: bounds on the distance of the ratio from 1."""

    LOW: ClassVar[float] = 0.2
    HIGH: ClassVar[float] = 0.2

    clip_ratio_c: float | None = None
    """Bound on the loss where the advantage is negative, in units of -advantage; None: 3.0."""

    def __post_init__(self) -> None:
        ClipConfig.__post_init__(self)
        c = self.clip_ratio_c
        require(c is None or c > 1, "actor.clip_ratio_c", c, "must be > 1")

    @property
    def dual(self) -> float:
        """The dual clip."""
        return 3.0 if self.clip_ratio_c is None else self.clip_ratio_c


@POLICY_LOSSES.register("vanilla", config=VanillaConfig)
def vanilla(inputs: PolicyLossInputs, cfg: VanillaConfig) -> TokenLoss:
    """Return the clipped loss, [T], unreduced."""
    ratio_T, advantages_T = probability_ratio(inputs.log_ratio_T), inputs.advantages_T
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - cfg.low, 1 + cfg.high)
    pessimistic_T = torch.maximum(plain_T, clipped_T)
    bound_T = -advantages_T * cfg.dual
    negative_T = advantages_T < 0
    loss_T = torch.where(negative_T, torch.minimum(pessimistic_T, bound_T), pessimistic_T)
    mask_T = inputs.segments.mask_T
    return TokenLoss(
        loss_T,
        {
            "actor/clip_frac": masked_mean(clipped_T > plain_T, mask_T),
            "actor/clip_frac_lower": masked_mean(negative_T & (pessimistic_T > bound_T), mask_T),
        },
    )
