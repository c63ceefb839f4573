"""RLOO: the reward against the mean of the other samples of the same prompt.

    A = r - mean of the other n - 1 = (r - mean_G) * n / (n - 1)

A lone sample keeps its reward. Source: arXiv:2402.14740, section 3.2.
Shapes: N samples, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AdvantageInputs
from mcore_rl.options import NoOptions

if TYPE_CHECKING:
    from torch import Tensor


@ADVANTAGES.register("rloo", config=NoOptions, min_group_size=2)
def rloo(inputs: AdvantageInputs, cfg: NoOptions) -> Tensor:
    """Return the leave-one-out advantage of each token's sample, [T] float64."""
    size_N = inputs.group_size_P[inputs.group_N]
    return inputs.segments.expand(inputs.centered_rewards_N * size_N / (size_N - 1).clamp(min=1))
