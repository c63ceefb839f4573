"""CISPO's loss: the policy gradient with the importance weight clipped, so every token trains.

    r = exp(logprob - old_logprob)
    l = -A sg(clip(r, 1 - low, 1 + high)) logprob        sg: no gradient

Where PPO's clip silences a token, this bounds its weight. The default low = 1 leaves the weight
unbounded below, as the paper does; high is to be tuned.

Source: MiniMax-M1, arXiv:2506.13585, eq. 4-5. Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mcore_rl.algorithms.losses.base import POLICY_LOSSES, ClipConfig, PolicyLossInputs, TokenLoss
from mcore_rl.algorithms.ratio import probability_ratio
from mcore_rl.metrics import masked_mean


@dataclass(kw_only=True)
class CispoConfig(ClipConfig):
    """Options of cispo: bounds on the distance of the weight from 1."""

    LOW: ClassVar[float] = 1.0
    HIGH: ClassVar[float] = 4.0


@POLICY_LOSSES.register("cispo", config=CispoConfig)
def cispo(inputs: PolicyLossInputs, cfg: CispoConfig) -> TokenLoss:
    """Return the weighted policy-gradient loss, [T], unreduced."""
    ratio_T = probability_ratio(inputs.log_ratio_T.detach())
    weight_T = ratio_T.clamp(1 - cfg.low, 1 + cfg.high)
    loss_T = -inputs.advantages_T * weight_T * inputs.logprobs_T
    return TokenLoss(
        loss_T,
        {"actor/clip_frac": masked_mean(weight_T != ratio_T, inputs.segments.mask_T)},
    )
