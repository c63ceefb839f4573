"""What a policy loss takes and returns, its registry, and how clip options become bounds.

Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mcore_rl.algorithms.segments import Segments
from mcore_rl.errors import require
from mcore_rl.metrics import Metrics
from mcore_rl.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipBounds:
    """How far a token may move; what the numbers bound (ratio or log-ratio) is the loss's own."""

    low: float = math.inf
    """Downwards, >= 0; infinite for a loss without clipping."""
    high: float = math.inf
    """Upwards, >= 0."""
    dual: float | None = None
    """Bound on the loss where the advantage is negative, in units of -advantage; None: none."""


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
    rollout_is_weights_T: Tensor | None = None
    """[T] float >= 0, correction for the engine's distribution; None: all 1."""

    def trained_only(self) -> PolicyLossInputs:
        """Return a copy with neutral values on untrained tokens: 0, and 1 for weights.

        So neither a value nor a gradient of an untrained token can be NaN, whatever came in.
        """
        mask_T = self.segments.mask_T
        old_T, weights_T = self.old_logprobs_T, self.rollout_is_weights_T
        return replace(
            self,
            logprobs_T=torch.where(mask_T, self.logprobs_T, 0.0),
            advantages_T=torch.where(mask_T, self.advantages_T, 0.0),
            old_logprobs_T=None if old_T is None else torch.where(mask_T, old_T, 0.0),
            rollout_is_weights_T=None if weights_T is None else torch.where(mask_T, weights_T, 1.0),
        )

    @property
    def log_ratio_T(self) -> Tensor:
        """[T], logprobs - old_logprobs."""
        assert self.old_logprobs_T is not None, "this loss needs old_logprobs"
        return self.logprobs_T - self.old_logprobs_T

    def rollout_weighted(self, loss_T: Tensor) -> Tensor:
        """Return `loss_T` [T] times the rollout weights, if there are any."""
        weights_T = self.rollout_is_weights_T
        return loss_T if weights_T is None else loss_T * weights_T


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

    compute: Callable[..., TokenLoss]
    """(inputs, clip: ClipBounds, **options) -> TokenLoss; the options are those of `reads`."""
    reads: tuple[str, ...] = ()
    """Of `objective.LOSS_OPTIONS`."""
    default_clip: tuple[float, float] | None = None
    """(low, high) unless the user sets them; None: the loss does not clip."""
    default_dual_clip: float | None = None
    """Dual clip unless the user sets it; None: the loss has none."""
    agg_mode: str | None = None
    """The one aggregation that the loss is defined with; None: the user's choice."""
    needs_old_logprobs: bool = True
    """False saves the forward pass that computes them."""


POLICY_LOSSES: Registry[PolicyLoss] = Registry("policy loss", "actor.policy_loss.loss_mode")


@dataclass(kw_only=True, slots=True)
class PolicyLossConfig:
    """Choice of the policy loss (`actor.policy_loss`)."""

    loss_mode: str = "vanilla"
    """A registered loss: vanilla, geo_mean, gpg, gspo, cispo, sapo, ..."""

    def __post_init__(self) -> None:
        POLICY_LOSSES.get(self.loss_mode)


def resolve_clip(
    loss_mode: str,
    clip_ratio: float | None,
    clip_ratio_low: float | None,
    clip_ratio_high: float | None,
    clip_ratio_c: float | None,
) -> ClipBounds:
    """Return the bounds of a loss from the `actor.clip_ratio*` options; None means not set.

    `clip_ratio_low` and `clip_ratio_high` fall back to `clip_ratio`, that to the loss's default.

    Raises:
        UserError: for an option out of range, or one that the loss does not read.
    """
    loss = POLICY_LOSSES.get(loss_mode)
    bounds = {
        "clip_ratio": clip_ratio,
        "clip_ratio_low": clip_ratio_low,
        "clip_ratio_high": clip_ratio_high,
    }
    unread = f"is not read by actor.policy_loss.loss_mode={loss_mode}"
    for name, value in bounds.items():
        reads = value is None or loss.default_clip is not None
        require(reads, f"actor.{name}", value, unread, "Remove it.")
        require(value is None or value >= 0, f"actor.{name}", value, "must be >= 0")
    reads = clip_ratio_c is None or loss.default_dual_clip is not None
    require(reads, "actor.clip_ratio_c", clip_ratio_c, unread, "Remove it.")
    in_range = clip_ratio_c is None or clip_ratio_c > 1
    require(in_range, "actor.clip_ratio_c", clip_ratio_c, "must be > 1")
    if loss.default_clip is None:
        return ClipBounds()
    default_low, default_high = loss.default_clip
    return ClipBounds(
        low=_first_set(clip_ratio_low, clip_ratio, default_low),
        high=_first_set(clip_ratio_high, clip_ratio, default_high),
        dual=clip_ratio_c if clip_ratio_c is not None else loss.default_dual_clip,
    )


def _first_set(*values: float | None) -> float:
    return next(value for value in values if value is not None)
