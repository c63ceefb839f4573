"""PPO's clipped loss per token, with the dual clip; with GRPO's advantages it is GRPO and DAPO.

    r = exp(logprob - old_logprob)
    l = max(-A r, -A clip(r, 1 - low, 1 + high)),      and where A < 0: l = min(l, -A c)

Source: arXiv:1707.06347, eq. 7; dual clip: arXiv:1912.09729, eq. 5; low != high: DAPO,
arXiv:2503.14476. Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

import torch

from mcore_rl.algorithms.losses.base import (
    POLICY_LOSSES,
    ClipBounds,
    PolicyLoss,
    PolicyLossInputs,
    TokenLoss,
)
from mcore_rl.algorithms.ratio import probability_ratio
from mcore_rl.metrics import masked_mean


def vanilla(inputs: PolicyLossInputs, clip: ClipBounds) -> TokenLoss:
    """Return the clipped loss, [T], unreduced."""
    assert clip.dual is not None
    ratio_T, advantages_T = probability_ratio(inputs.log_ratio_T), inputs.advantages_T
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - clip.low, 1 + clip.high)
    pessimistic_T = torch.maximum(plain_T, clipped_T)
    bound_T = -advantages_T * clip.dual
    negative_T = advantages_T < 0
    loss_T = torch.where(negative_T, torch.minimum(pessimistic_T, bound_T), pessimistic_T)
    mask_T = inputs.segments.mask_T
    return TokenLoss(
        inputs.rollout_weighted(loss_T),
        {
            "actor/clip_frac": masked_mean(clipped_T > plain_T, mask_T),
            "actor/clip_frac_lower": masked_mean(negative_T & (pessimistic_T > bound_T), mask_T),
        },
    )


POLICY_LOSSES.add(
    "vanilla", PolicyLoss(compute=vanilla, default_clip=(0.2, 0.2), default_dual_clip=3.0)
)
