"""A policy loss of one's own: PPO's ratio without a clip, pulled back by a quadratic penalty.

    l = -A r + (r - 1)^2 / 2        r = exp(logprob - old_logprob)

Importing the module registers the loss; `MCORE_RL_PLUGINS` has every process import it.
Shapes: T packed tokens.
"""

from mcore_rl.algorithms.losses import (
    POLICY_LOSSES,
    ClipBounds,
    PolicyLoss,
    PolicyLossInputs,
    TokenLoss,
)
from mcore_rl.algorithms.ratio import probability_ratio
from mcore_rl.metrics import masked_mean


def smooth_ratio(inputs: PolicyLossInputs, clip: ClipBounds) -> TokenLoss:
    """Return the loss of each token, [T], unreduced; `clip` has no bounds."""
    ratio_T = probability_ratio(inputs.log_ratio_T)
    penalty_T = (ratio_T - 1).square() / 2
    loss_T = inputs.rollout_weighted(-inputs.advantages_T * ratio_T + penalty_T)
    return TokenLoss(
        loss_T, {"actor/ratio_penalty": masked_mean(penalty_T, inputs.segments.mask_T)}
    )


POLICY_LOSSES.add("smooth_ratio", PolicyLoss(compute=smooth_ratio))
