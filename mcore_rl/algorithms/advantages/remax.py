"""ReMax: the reward against that of the greedy response to the same prompt.

    A = r - r_greedy

The greedy response is generated and scored by the loop and does not train.
Source: arXiv:2310.10505, algorithm 2. Shapes: N samples, T tokens.
"""

from __future__ import annotations

from torch import Tensor

from mcore_rl.algorithms.advantages.base import (
    ADVANTAGES,
    AdvantageEstimator,
    AdvantageInputs,
    AlgorithmConfig,
)


def remax(inputs: AdvantageInputs, cfg: AlgorithmConfig) -> Tensor:
    """Return the advantage over the greedy response of each token's sample, [T] float64."""
    assert inputs.baseline_N is not None, "remax needs the reward of a greedy response"
    return inputs.segments.expand(inputs.rewards_N - inputs.baseline_N)


ADVANTAGES.add("remax", AdvantageEstimator(compute=remax, needs_greedy_baseline=True))
