"""An advantage estimator of one's own: the reward against the median of the group, bounded.

    A = clip(r - median_G, -limit, limit)

Importing the module registers the estimator; `MCORE_RL_PLUGINS` has every process import it. Its
option is a key of the section `algorithm`: algorithm.advantage_limit=2.
Shapes: N samples, P groups, T tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from mcore_rl.algorithms.advantages import ADVANTAGES, AdvantageInputs
from mcore_rl.errors import require


@dataclass(kw_only=True, slots=True)
class GroupMedianConfig:
    """Options of group_median."""

    advantage_limit: float = 1.0
    """Largest size of an advantage."""

    def __post_init__(self) -> None:
        limit = self.advantage_limit
        require(limit > 0, "algorithm.advantage_limit", limit, "must be > 0")


@ADVANTAGES.register("group_median", config=GroupMedianConfig, min_group_size=2)
def group_median(inputs: AdvantageInputs, cfg: GroupMedianConfig) -> Tensor:
    """Return the bounded advantage of each token's sample, [T] float64."""
    # Samples by group, and within a group by reward; of an even number the lower median.
    order_N = inputs.rewards_N.argsort()
    order_N = order_N[inputs.group_N[order_N].argsort(stable=True)]
    first_P = inputs.group_size_P.cumsum(0) - inputs.group_size_P
    median_P = inputs.rewards_N[order_N[first_P + (inputs.group_size_P - 1) // 2]]
    advantages_N = inputs.relative_to(median_P).clamp(-cfg.advantage_limit, cfg.advantage_limit)
    return inputs.segments.expand(advantages_N)
