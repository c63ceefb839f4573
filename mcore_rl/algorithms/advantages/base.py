"""What an advantage estimator takes and returns, its registry, and the `algorithm` section.

Everything is float64 on the host: group statistics are differences of nearly equal numbers.

Shapes: N samples, P groups (prompts), T tokens of the N samples laid end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mcore_rl.algorithms.corrections import RolloutCorrectionConfig
from mcore_rl.algorithms.filter_groups import FilterGroupsConfig
from mcore_rl.algorithms.kl import KL_VALUES
from mcore_rl.algorithms.kl_in_reward import KlCtrlConfig
from mcore_rl.errors import require_one_of
from mcore_rl.lazy_torch import torch
from mcore_rl.options import ChoosingSection, check_options
from mcore_rl.registry import Registry
from mcore_rl.segments import Segments

if TYPE_CHECKING:
    from torch import Tensor

Options = TypeVar("Options")


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
    """A registered estimator and what it asks of its surroundings."""

    compute: Callable[[AdvantageInputs, Any], Tensor]
    """(inputs, options) -> advantages_T, [T] float64, 0 on untrained tokens."""
    config: type
    """Dataclass of its options."""
    min_group_size: int
    """Fewest samples per prompt with which it is defined."""
    needs_greedy_baseline: bool
    """Whether the loop answers every prompt once more, greedily, for `baseline_N`."""
    returns: Callable[[AdvantageInputs, Any], Tensor] | None
    """(inputs, options) -> what a critic learns, [T] float64, 0 on untrained tokens; None: it needs
    none."""

    @property
    def needs_critic(self) -> bool:
        """Whether `values_T` is read and a critic trains on `returns`."""
        return self.returns is not None


class AdvantageRegistry(Registry[AdvantageEstimator]):
    """The estimators by name."""

    def register(  # pyright: ignore[reportIncompatibleMethodOverride]  # decorates functions
        self,
        name: str,
        *,
        config: type[Options],
        min_group_size: int = 1,
        needs_greedy_baseline: bool = False,
        returns: Callable[[AdvantageInputs, Options], Tensor] | None = None,
    ) -> Callable[
        [Callable[[AdvantageInputs, Options], Tensor]],
        Callable[[AdvantageInputs, Options], Tensor],
    ]:
        """Return a decorator that registers a function as the estimator `name`.

        Args:
            name: what chooses it.
            config: dataclass of its options, keys of the section `algorithm`; each has a default.
            min_group_size: as in `AdvantageEstimator`.
            needs_greedy_baseline: as in `AdvantageEstimator`.
            returns: as in `AdvantageEstimator`.
        """
        check_options(name, config)

        def register(
            compute: Callable[[AdvantageInputs, Options], Tensor],
        ) -> Callable[[AdvantageInputs, Options], Tensor]:
            entry = AdvantageEstimator(
                compute=compute,
                config=config,
                min_group_size=min_group_size,
                needs_greedy_baseline=needs_greedy_baseline,
                returns=returns,
            )
            self.add(name, entry)
            return compute

        return register


ADVANTAGES = AdvantageRegistry("advantage estimator", "algorithm.adv_estimator")


@dataclass(kw_only=True)
class AlgorithmConfig(ChoosingSection):
    """How rewards become advantages (`algorithm`); has the options of its estimator too."""

    REGISTRY: ClassVar[Registry[AdvantageEstimator]] = ADVANTAGES

    adv_estimator: str = "grpo"
    """A registered estimator: grpo, gpg, rloo, ..."""
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
        require_one_of("algorithm.kl_penalty", self.kl_penalty, KL_VALUES)
        assert self.options is not None  # refuses what the estimator's options refuse

    @classmethod
    def choose(cls, name: str) -> dict[str, Any]:
        return {"adv_estimator": name}

    @property
    def choice(self) -> str:
        return self.adv_estimator
