"""What an advantage estimator takes and returns, its registry, and the `algorithm` section.

Everything is float64 on the host: group statistics are differences of nearly equal numbers.

Shapes: N samples, P groups (prompts), T tokens of the N samples laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mcore_rl.algorithms.kl import KL_VALUES
from mcore_rl.algorithms.kl_in_reward import KlCtrlConfig
from mcore_rl.algorithms.options import refuse_unread
from mcore_rl.algorithms.segments import Segments
from mcore_rl.errors import require, require_one_of
from mcore_rl.registry import Registry

ESTIMATOR_OPTIONS = ("norm_adv_by_std_in_grpo", "gpg_alpha", "gpg_f_norm", "gamma", "lam")
"""Fields of `AlgorithmConfig` that only some estimators read."""

GPG_ALPHAS = ("valid_groups", "nonzero_reward", "none")


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """How rewards become advantages (`algorithm`)."""

    adv_estimator: str = "grpo"
    """A registered estimator: grpo, gpg, ..."""
    norm_adv_by_std_in_grpo: bool = True
    """grpo: divide by the group's standard deviation; False is Dr.GRPO."""
    gpg_alpha: str = "valid_groups"
    """gpg: scale of the gradient, see `advantages/gpg.py`: valid_groups, nonzero_reward, none."""
    gpg_f_norm: float = 1.0
    """gpg: advantages are divided by it."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """Lambda of generalized advantage estimation."""
    use_kl_in_reward: bool = False
    """Take the KL against the reference off the reward; off, the two below are not read."""
    kl_penalty: str = "kl"
    """Estimator of that KL, one of `kl.KL_VALUES`."""
    kl_ctrl: KlCtrlConfig = field(default_factory=KlCtrlConfig)
    """Its coefficient."""

    def __post_init__(self) -> None:
        estimator = ADVANTAGES.get(self.adv_estimator)
        require_one_of("algorithm.gpg_alpha", self.gpg_alpha, GPG_ALPHAS)
        require(self.gpg_f_norm > 0, "algorithm.gpg_f_norm", self.gpg_f_norm, "must be > 0")
        require(0 <= self.gamma <= 1, "algorithm.gamma", self.gamma, "must be in [0, 1]")
        require(0 <= self.lam <= 1, "algorithm.lam", self.lam, "must be in [0, 1]")
        require_one_of("algorithm.kl_penalty", self.kl_penalty, KL_VALUES)
        unread = [name for name in ESTIMATOR_OPTIONS if name not in estimator.reads]
        refuse_unread(self, "algorithm", unread, f"adv_estimator={self.adv_estimator}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageInputs:
    """The samples of one step. A group of one has mean 0 and standard deviation 1 by convention."""

    rewards_N: Tensor
    """[N] float64, finite."""
    group_N: Tensor
    """[N] int64, number of each sample's group: 0 .. P-1, none empty."""
    segments: Segments
    """Tokens of the N samples."""

    @property
    def group_size_P(self) -> Tensor:
        """[P] int64, samples of each group."""
        return self.group_N.bincount()

    @property
    def has_equal_rewards_P(self) -> Tensor:
        """[P] bool, True for groups of several samples whose rewards are all equal."""
        size_P = self.group_size_P
        zeros_P = self.rewards_N.new_zeros(len(size_P))
        max_P, min_P = (
            zeros_P.scatter_reduce(0, self.group_N, self.rewards_N, how, include_self=False)
            for how in ("amax", "amin")
        )
        return (max_P == min_P) & (size_P > 1)

    @property
    def centered_rewards_N(self) -> Tensor:
        """[N] float64, reward - mean of the group; exactly 0 where a group's rewards are equal."""
        size_P = self.group_size_P
        sum_P = self.group_sum(self.rewards_N)
        mean_P = torch.where(size_P > 1, sum_P / size_P, 0.0)
        # A mean of equal numbers may miss them by a rounding error, which estimators amplify.
        equal_N = self.has_equal_rewards_P[self.group_N]
        return torch.where(equal_N, 0.0, self.rewards_N - mean_P[self.group_N])

    def group_sum(self, x_N: Tensor) -> Tensor:
        """Return the sum of `x_N` [N] over each group, [P]."""
        return x_N.new_zeros(len(self.group_size_P)).index_add(0, self.group_N, x_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageEstimator:
    """A registered estimator and which options it reads."""

    compute: Callable[[AdvantageInputs, AlgorithmConfig], Tensor]
    """Returns advantages_T, [T] float64, 0 on untrained tokens."""
    reads: tuple[str, ...] = ()
    """Of `ESTIMATOR_OPTIONS`."""


ADVANTAGES: Registry[AdvantageEstimator] = Registry(
    "advantage estimator", "algorithm.adv_estimator"
)
