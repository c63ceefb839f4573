"""A policy loss of one's own: PPO's ratio without a clip, pulled back by a quadratic penalty.

    l = -A r + strength (r - 1)^2        r = exp(logprob - old_logprob)

Importing the module registers the loss; `MCORE_RL_PLUGINS` has every process import it. Its option
is a key of the section `actor`: actor.penalty_strength=2. Shapes: T packed tokens.
"""

from dataclasses import dataclass

from mcore_rl.algorithms.losses import POLICY_LOSSES, PolicyLossInputs, TokenLoss
from mcore_rl.algorithms.ratio import probability_ratio
from mcore_rl.errors import require
from mcore_rl.metrics import masked_mean


@dataclass(kw_only=True, slots=True)
class SmoothRatioConfig:
    """Options of smooth_ratio."""

    penalty_strength: float = 0.5
    """Weight of the penalty on the distance of the ratio from 1."""

    def __post_init__(self) -> None:
        strength = self.penalty_strength
        require(strength >= 0, "actor.penalty_strength", strength, "must be >= 0")


@POLICY_LOSSES.register("smooth_ratio", config=SmoothRatioConfig)
def smooth_ratio(inputs: PolicyLossInputs, cfg: SmoothRatioConfig) -> TokenLoss:
    """Return the loss of each token, [T], unreduced."""
    ratio_T = probability_ratio(inputs.log_ratio_T)
    penalty_T = cfg.penalty_strength * (ratio_T - 1).square()
    return TokenLoss(
        -inputs.advantages_T * ratio_T + penalty_T,
        {"actor/ratio_penalty": masked_mean(penalty_T, inputs.segments.mask_T)},
    )
