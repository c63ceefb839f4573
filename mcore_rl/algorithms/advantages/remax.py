"""ReMax: the reward against that of the greedy response to the same prompt.

    A = r - r_greedy

The greedy response is generated and scored by the loop and does not train.
Source: arXiv:2310.10505, algorithm 2. Shapes: N samples, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AdvantageInputs
from mcore_rl.options import NoOptions

if TYPE_CHECKING:
    from torch import Tensor


@ADVANTAGES.register("remax", config=NoOptions, needs_greedy_baseline=True)
def remax(inputs: AdvantageInputs, cfg: NoOptions) -> Tensor:
    """Return the advantage over the greedy response of each token's sample, [T] float64."""
    assert inputs.baseline_N is not None, "remax needs the reward of a greedy response"
    return inputs.segments.expand(inputs.rewards_N - inputs.baseline_N)
