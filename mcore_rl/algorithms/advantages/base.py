"""What an advantage estimator takes and returns, its registry, and the `algorithm` section.

Everything is float64 on the host: group statistics are differences of nearly equal numbers.

Shapes: N samples, P groups (prompts), T tokens of the N samples laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mcore_rl.algorithms.corrections import RolloutCorrectionConfig
from mcore_rl.algorithms.filter_groups import FilterGroupsConfig
from mcore_rl.algorithms.kl import KL_VALUES
from mcore_rl.algorithms.kl_in_reward import KlCtrlConfig
from mcore_rl.algorithms.segments import Segments
from mcore_rl.errors import refuse_unread, require, require_one_of
from mcore_rl.registry import Registry

ESTIMATOR_OPTIONS = ("norm_adv_by_std_in_grpo", "gpg_alpha", "gpg_f_norm", "gamma", "lam")
"""Fields of `AlgorithmConfig` that only some estimators read."""

GPG_ALPHAS = ("valid_groups", "nonzero_reward", "none")


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """How rewards become advantages (`algorithm`)."""

    adv_estimator: str = "grpo"
    """A registered estimator: grpo, gpg, rloo, ..."""
    norm_adv_by_std_in_grpo: bool = True
    """grpo, grpo_passk: divide by the group's standard deviation; False is Dr.GRPO."""
    gpg_alpha: str = "valid_groups"
    """gpg: scale of the gradient, see `advantages/gpg.py`: valid_groups, nonzero_reward, none."""
    gpg_f_norm: float = 1.0
    """gpg: advantages are divided by it."""
    gamma: float = 1.0
    """gae, reinforce_plus_plus: discount per token."""
    lam: float = 1.0
    """gae: how far rewards reach back past the critic's values; 0: one token, 1: all the way."""
    use_kl_in_reward: bool = False
    """Take the KL against the reference off the reward; off, the two below are not read."""
    kl_penalty: str = "kl"
    """Estimator of that KL, one of `kl.KL_VALUES`."""
    kl_ctrl: KlCtrlConfig = field(default_factory=KlCtrlConfig)
    """Its coefficient."""
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    overlong_filtering: bool = False
    """Truncated samples do not train."""
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)

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
    """Tokens of the N samples, in their order."""
    num_response_tokens_N: Tensor
    """[N] float64, tokens of each response, also where none of them trains."""
    baseline_N: Tensor | None = None
    """[N] float64, reward of a greedy response to the sample's prompt; None unless the estimator
    asks for it."""
    values_T: Tensor | None = None
    """[T] float64, the critic's values; None unless the estimator needs a critic."""

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
        """[N] float64, reward - mean of the group."""
        return self.relative_to(self.group_sum(self.rewards_N) / self.group_size_P)

    @property
    def std_P(self) -> Tensor:
        """[P] float64, unbiased standard deviation of each group's rewards."""
        size_P = self.group_size_P
        variance_P = self.group_sum(self.centered_rewards_N.square()) / (size_P - 1).clamp(min=1)
        return torch.where(size_P > 1, variance_P.sqrt(), 1.0)

    def relative_to(self, mean_P: Tensor) -> Tensor:
        """Return reward - `mean_P` [P] of the group, [N]; exactly 0 where its rewards are equal.

        Args:
            mean_P: a mean of each group's rewards, with any weights; taken as 0 for a group of one.
        """
        mean_P = torch.where(self.group_size_P > 1, mean_P, 0.0)
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
    min_group_size: int = 1
    """Fewest samples per prompt with which it is what it says: one that compares the samples of a
    prompt needs two, and would take the reward itself for the advantage of a lone one."""
    needs_greedy_baseline: bool = False
    """Whether the loop answers every prompt once more, greedily, for `baseline_N`."""
    returns: Callable[[AdvantageInputs, AlgorithmConfig], Tensor] | None = None
    """Returns what a critic learns, [T] float64, 0 on untrained tokens; None: it needs none."""

    @property
    def needs_critic(self) -> bool:
        """Whether `values_T` is read and a critic trains on `returns`."""
        return self.returns is not None


ADVANTAGES: Registry[AdvantageEstimator] = Registry(
    "advantage estimator", "algorithm.adv_estimator"
)
