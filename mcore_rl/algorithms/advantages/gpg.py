"""GPG: centered rewards, scaled up for the groups that teach nothing.

    A = alpha * (r - mean_G) / f_norm

    valid_groups    alpha = B / (B - M): B samples of the batch, M of them in groups whose rewards
                    are all equal; the paper's, default
    nonzero_reward  alpha = B / samples with a reward other than 0; verl's
    none            alpha = 1

Both divisors are at least 1. The counts are over the whole batch, all ranks: the controller holds
it. Source: GPG, arXiv:2504.02546, eq. 7-8. Shapes: N samples, P groups, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AdvantageInputs
from mcore_rl.errors import require, require_one_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class GpgConfig:
    """Options of gpg."""

    gpg_alpha: str = "valid_groups"
    """Scale of the gradient, see above: valid_groups, nonzero_reward, none."""
    gpg_f_norm: float = 1.0
    """Advantages are divided by it."""

    def __post_init__(self) -> None:
        require_one_of("algorithm.gpg_alpha", self.gpg_alpha, ALPHAS)
        require(self.gpg_f_norm > 0, "algorithm.gpg_f_norm", self.gpg_f_norm, "must be > 0")


@ADVANTAGES.register("gpg", config=GpgConfig, min_group_size=2)
def gpg(inputs: AdvantageInputs, cfg: GpgConfig) -> Tensor:
    """Return the scaled, centered reward of each token's sample, [T] float64."""
    alpha = ALPHAS[cfg.gpg_alpha](inputs)
    return inputs.segments.expand(alpha * inputs.centered_rewards_N / cfg.gpg_f_norm)


def _valid_groups(inputs: AdvantageInputs) -> float:
    num_samples = len(inputs.rewards_N)
    num_useless = int(inputs.has_equal_rewards_P[inputs.group_N].sum())
    return num_samples / max(num_samples - num_useless, 1)


def _nonzero_reward(inputs: AdvantageInputs) -> float:
    return len(inputs.rewards_N) / max(int(inputs.rewards_N.count_nonzero()), 1)


def _none(inputs: AdvantageInputs) -> float:
    return 1.0


ALPHAS = {"valid_groups": _valid_groups, "nonzero_reward": _nonzero_reward, "none": _none}
