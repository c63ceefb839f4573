"""REINFORCE++: the discounted reward of each token, whitened over the whole batch, without groups.

    R_t = gamma^(trained tokens of the sample after t) * r,      A = whiten(R)

Source: arXiv:2501.03262. There the KL penalty of each token is a reward of that token; here it is
part of r (`kl_in_reward.py`). Shapes: N samples, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from mcore_rl.algorithms.advantages.base import (
    ADVANTAGES,
    AdvantageEstimator,
    AdvantageInputs,
    AlgorithmConfig,
)
from mcore_rl.algorithms.advantages.whiten import whiten


def reinforce_plus_plus(inputs: AdvantageInputs, cfg: AlgorithmConfig) -> Tensor:
    """Return the whitened return of each token, [T] float64."""
    segments = inputs.segments
    later_T = segments.expand(segments.num_tokens_S.cumsum(0)) - segments.mask_T.cumsum(0)
    returns_T = segments.expand(inputs.rewards_N) * cfg.gamma**later_T
    return whiten(returns_T, segments.mask_T)


ADVANTAGES.add(
    "reinforce_plus_plus", AdvantageEstimator(compute=reinforce_plus_plus, reads=("gamma",))
)
