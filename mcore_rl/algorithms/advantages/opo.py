"""OPO: the reward against the length-weighted mean of the group, the baseline of least variance.

    A_i = r_i - sum_j n_j r_j / sum_j n_j        n_j: response tokens of sample j of the group

Source: arXiv:2505.23585, eq. 7. Shapes: N samples, P groups, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AdvantageInputs
from mcore_rl.options import NoOptions

if TYPE_CHECKING:
    from torch import Tensor


@ADVANTAGES.register("opo", config=NoOptions, min_group_size=2)
def opo(inputs: AdvantageInputs, cfg: NoOptions) -> Tensor:
    """Return the advantage of each token's sample, [T] float64."""
    length_N = inputs.num_response_tokens_N
    length_P = inputs.group_sum(length_N).clamp(min=1)
    baseline_P = inputs.group_sum(length_N * inputs.rewards_N) / length_P
    return inputs.segments.expand(inputs.relative_to(baseline_P))
