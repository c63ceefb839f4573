"""SAPO's loss: a smooth gate on the ratio in place of a clip, narrower for negative advantages.

    r = exp(logprob - old_logprob),     tau = tau_pos where A > 0, tau_neg elsewhere
    l = -A sigmoid(tau (r - 1)) 4 / tau

At r = 1 the gradient is that of -A r; away from it the gate lets it fade on both sides, the faster
the larger tau.

Source: SAPO, arXiv:2511.20347, eq. 5-6; its objective is a mean over sequences of means over
tokens. Shapes: T packed tokens on this rank.
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


def sapo(
    inputs: PolicyLossInputs, clip: ClipBounds, *, tau_pos: float, tau_neg: float
) -> TokenLoss:
    """Return the gated loss, [T], unreduced; `clip` has no bounds.

    Args:
        inputs: the micro-batch.
        clip: not read.
        tau_pos: > 0, temperature of the gate where the advantage is positive.
        tau_neg: > 0, where it is not.
    """
    ratio_T, advantages_T = probability_ratio(inputs.log_ratio_T), inputs.advantages_T
    tau_T = torch.full_like(advantages_T, tau_neg).masked_fill(advantages_T > 0, tau_pos)
    loss_T = -advantages_T * torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T
    return TokenLoss(inputs.rollout_weighted(loss_T), {})


POLICY_LOSSES.add(
    "sapo",
    PolicyLoss(compute=sapo, reads=("tau_pos", "tau_neg"), agg_mode="seq-mean-token-mean"),
)
