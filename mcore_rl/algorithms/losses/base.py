"""What a policy loss takes and returns, its registry, and the options of losses that clip.

Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mcore_rl.errors import require
from mcore_rl.lazy_torch import torch
from mcore_rl.metrics import Metrics
from mcore_rl.options import check_options
from mcore_rl.registry import Registry
from mcore_rl.segments import Segments

if TYPE_CHECKING:
    from torch import Tensor

Options = TypeVar("Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLossInputs:
    """One micro-batch as a policy loss sees it. The gradient reaches `logprobs_T` only."""

    logprobs_T: Tensor
    """[T] float, this forward."""
    advantages_T: Tensor
    """[T] float."""
    segments: Segments
    """Of the T tokens."""
    old_logprobs_T: Tensor | None = None
    """[T] float; None only for losses that do not need it."""
    rollout_weights_T: Tensor | None = None
    """[T] float >= 0, correction for the engine's distribution, for losses that are registered with
    `applies_rollout_weights`; None: all 1, and for all other losses."""

    def trained_only(self) -> PolicyLossInputs:
        """Return a copy with neutral values on untrained tokens: 0, and 1 for weights.

        So neither a value nor a gradient of an untrained token can be NaN, whatever came in.
        """
        mask_T = self.segments.mask_T
        old_T, weights_T = self.old_logprobs_T, self.rollout_weights_T
        return replace(
            self,
            logprobs_T=torch.where(mask_T, self.logprobs_T, 0.0),
            advantages_T=torch.where(mask_T, self.advantages_T, 0.0),
            old_logprobs_T=None if old_T is None else torch.where(mask_T, old_T, 0.0),
            rollout_weights_T=None if weights_T is None else torch.where(mask_T, weights_T, 1.0),
        )

    @property
    def log_ratio_T(self) -> Tensor:
        """[T], logprobs - old_logprobs."""
        assert self.old_logprobs_T is not None, "this loss needs old_logprobs"
        return self.logprobs_T - self.old_logprobs_T


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """What a policy loss returns."""

    loss_T: Tensor
    """[T], unreduced; `aggregate.token_weights` makes the objective of it."""
    metrics: Metrics
    """Of this loss alone, keys in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """A registered policy loss and what it asks of its surroundings."""

    compute: Callable[[PolicyLossInputs, Any], TokenLoss]
    """(inputs, options) -> TokenLoss."""
    config: type
    """Dataclass of its options."""
    agg_mode: str | None
    """The one aggregation that the loss is defined with; None: the user's choice."""
    needs_old_logprobs: bool
    """False saves the forward pass that computes them."""
    applies_rollout_weights: bool
    """True: the loss reads `inputs.rollout_weights_T`; False: its token losses are multiplied by
    them (`objective.actor_objective`)."""


class PolicyLossRegistry(Registry[PolicyLoss]):
    """The losses by name."""

    def register(  # pyright: ignore[reportIncompatibleMethodOverride]  # decorates functions
        self,
        name: str,
        *,
        config: type[Options],
        agg_mode: str | None = None,
        needs_old_logprobs: bool = True,
        applies_rollout_weights: bool = False,
    ) -> Callable[
        [Callable[[PolicyLossInputs, Options], TokenLoss]],
        Callable[[PolicyLossInputs, Options], TokenLoss],
    ]:
        """Return a decorator that registers a function as the loss `name`.

        Args:
            name: what chooses it.
            config: dataclass of its options, keys of the section `actor`; each has a default.
            agg_mode: as in `PolicyLoss`.
            needs_old_logprobs: as in `PolicyLoss`.
            applies_rollout_weights: as in `PolicyLoss`.
        """
        check_options(name, config)

        def register(
            compute: Callable[[PolicyLossInputs, Options], TokenLoss],
        ) -> Callable[[PolicyLossInputs, Options], TokenLoss]:
            entry = PolicyLoss(
                compute=compute,
                config=config,
                agg_mode=agg_mode,
                needs_old_logprobs=needs_old_logprobs,
                applies_rollout_weights=applies_rollout_weights,
            )
            self.add(name, entry)
            return compute

        return register


POLICY_LOSSES = PolicyLossRegistry("policy loss", "actor.policy_loss.loss_mode")


@dataclass(kw_only=True, slots=True)
class PolicyLossConfig:
    """Choice of the policy loss (`actor.policy_loss`)."""

    loss_mode: str = "vanilla"
    """A registered loss: vanilla, geo_mean, gpg, gspo, cispo, sapo, ..."""

    def __post_init__(self) -> None:
        POLICY_LOSSES.get(self.loss_mode)


@dataclass(kw_only=True)
class ClipConfig:
    """Options of a loss that clips, under verl's names; what the bounds are of (ratio or log-ratio)
    and what they are unless the user sets them is the loss's own."""

    LOW: ClassVar[float]
    HIGH: ClassVar[float]

    clip_ratio: float | None = None
    """Bound for both sides; None: the loss's own two."""
    clip_ratio_low: float | None = None
    """How far a token may move downwards; None: `clip_ratio`."""
    clip_ratio_high: float | None = None
    """Upwards; None: `clip_ratio`."""

    def __post_init__(self) -> None:
        for name in ("clip_ratio", "clip_ratio_low", "clip_ratio_high"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"actor.{name}", value, "must be >= 0")

    @property
    def low(self) -> float:
        """The bound downwards, >= 0."""
        return _first_set(self.clip_ratio_low, self.clip_ratio, self.LOW)

    @property
    def high(self) -> float:
        """The bound upwards, >= 0."""
        return _first_set(self.clip_ratio_high, self.clip_ratio, self.HIGH)

    @property
    def clip_ratio_is_unread(self) -> bool:
        """Whether it is set and both sides override it."""
        sides = (self.clip_ratio_low, self.clip_ratio_high)
        return self.clip_ratio is not None and None not in sides


def _first_set(*values: float | None) -> float:
    return next(value for value in values if value is not None)
