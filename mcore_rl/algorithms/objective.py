"""The actor's objective of one micro-batch: policy loss, KL and entropy under one aggregation.

    objective = sum_T w_T * (r_T * policy_loss_T + kl_loss_coef * kl_T - entropy_coeff * entropy_T)

`w_T` comes from `aggregate.token_weights`, so the objectives of all micro-batches and ranks of a
minibatch add up to that of the minibatch, and so do their gradients. An empty micro-batch gives 0,
still connected to the graph, so that every rank can run its backward pass. `r_T` are the weights of
the rollout correction (`corrections.py`); a loss that applies them itself says so where it is
registered, so none can lose them by forgetting them.

Here the untrained tokens are neutralized, once, before anything is computed from them.
Multiplication by Megatron's factors happens in `megatron/forward_backward.py`, not here.

Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from mcore_rl.algorithms.aggregate import AGG_MODES, SCALED_AGG_MODE, token_weights
from mcore_rl.algorithms.kl import KL_KINDS, kl_penalty
from mcore_rl.algorithms.losses.base import (
    POLICY_LOSSES,
    ClipConfig,
    PolicyLoss,
    PolicyLossConfig,
    PolicyLossInputs,
)
from mcore_rl.algorithms.losses.sft import sft
from mcore_rl.algorithms.ratio import ratio_metrics
from mcore_rl.errors import require, require_one_of
from mcore_rl.lazy_torch import torch
from mcore_rl.metrics import Metrics, masked_mean, share
from mcore_rl.options import ChoosingSection
from mcore_rl.registry import Registry
from mcore_rl.segments import Segments
from mcore_rl.types import Denominators

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ObjectiveConfig(ChoosingSection):
    """The part of the `actor` section that describes what is minimized; has the options of its
    loss too."""

    REGISTRY: ClassVar[Registry[PolicyLoss]] = POLICY_LOSSES

    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    """Which loss."""
    loss_agg_mode: str = "token-mean"
    """One of `aggregate.AGG_MODES`; a loss with an aggregation of its own does not read it."""
    loss_scale_factor: float | None = None
    """Constant of seq-mean-token-sum-norm, in tokens; None: `data.max_response_length`."""
    use_kl_loss: bool = False
    """Add a KL term against the reference model; off, the two options below are not read."""
    kl_loss_coef: float = 0.001
    """Weight of the KL term."""
    kl_loss_type: str = "low_var_kl"
    """Estimator, one of `kl.KL_KINDS`."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus; 0 leaves the entropy uncomputed."""

    def __post_init__(self) -> None:
        require_one_of("actor.loss_agg_mode", self.loss_agg_mode, AGG_MODES)
        require_one_of("actor.kl_loss_type", self.kl_loss_type, KL_KINDS)
        require(self.kl_loss_coef >= 0, "actor.kl_loss_coef", self.kl_loss_coef, "must be >= 0")
        factor = self.loss_scale_factor
        require(factor is None or factor > 0, "actor.loss_scale_factor", factor, "must be > 0")
        rule = f"is not read with the aggregation {self.agg_mode}"
        reads = factor is None or self.agg_mode == SCALED_AGG_MODE
        require(reads, "actor.loss_scale_factor", factor, rule, "Remove it.")
        assert self.options is not None  # refuses what the loss's options refuse

    @classmethod
    def choose(cls, name: str) -> dict[str, Any]:
        return {"policy_loss": PolicyLossConfig(loss_mode=name)}

    @property
    def choice(self) -> str:
        return self.policy_loss.loss_mode

    @property
    def loss(self) -> PolicyLoss:
        return POLICY_LOSSES.get(self.policy_loss.loss_mode)

    @property
    def agg_mode(self) -> str:
        """The aggregation in force: the loss's own if it has one."""
        return self.loss.agg_mode or self.loss_agg_mode


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorObjective:
    """What is minimized, every default resolved."""

    policy_loss: PolicyLoss
    options: Any
    """Of the loss: an object of `policy_loss.config`."""
    agg_mode: str
    loss_scale_factor: float | None = None
    """Set exactly when `agg_mode` reads it."""
    kl_loss_type: str | None = None
    """None: no KL term."""
    kl_loss_coef: float = 0.0
    entropy_coeff: float = 0.0

    @property
    def needs_old_logprobs(self) -> bool:
        return self.policy_loss.needs_old_logprobs

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coeff != 0


def resolve_objective(cfg: ObjectiveConfig, max_response_length: int) -> ActorObjective:
    """Return the objective that `cfg` describes.

    Args:
        cfg: what the user set.
        max_response_length: tokens; stands in for an unset `loss_scale_factor`.
    """
    agg_mode, factor = cfg.agg_mode, cfg.loss_scale_factor
    if cfg.loss_agg_mode not in (agg_mode, ObjectiveConfig().loss_agg_mode):
        logger.warning(
            "actor.loss_agg_mode=%s does not apply: actor.policy_loss.loss_mode=%s always uses %s",
            cfg.loss_agg_mode,
            cfg.policy_loss.loss_mode,
            agg_mode,
        )
    options = cfg.options
    if isinstance(options, ClipConfig) and options.clip_ratio_is_unread:
        logger.warning(
            "actor.clip_ratio=%s does not apply: actor.clip_ratio_low and clip_ratio_high are set",
            options.clip_ratio,
        )
    if agg_mode == SCALED_AGG_MODE and factor is None:
        factor = float(max_response_length)
    return ActorObjective(
        policy_loss=cfg.loss,
        options=options,
        agg_mode=agg_mode,
        loss_scale_factor=factor,
        kl_loss_type=cfg.kl_loss_type if cfg.use_kl_loss else None,
        kl_loss_coef=cfg.kl_loss_coef if cfg.use_kl_loss else 0.0,
        entropy_coeff=cfg.entropy_coeff,
    )


def actor_objective(
    inputs: PolicyLossInputs,
    *,
    rollout_weights_T: Tensor | None = None,
    entropy_T: Tensor | None = None,
    ref_logprobs_T: Tensor | None = None,
    denominators: Denominators,
    spec: ActorObjective,
) -> tuple[Tensor, Metrics]:
    """Return this micro-batch's part of the minibatch objective, and its metrics.

    Args:
        inputs: the micro-batch; values on untrained tokens do not matter, NaN included.
        rollout_weights_T: [T] float >= 0, of the rollout correction; None: all 1.
        entropy_T: [T] float, differentiable, in nats; required if `spec.needs_entropy`, otherwise
            only logged.
        ref_logprobs_T: [T] float; required if `spec` has a KL term, otherwise not read.
        denominators: counts over the whole minibatch and all data-parallel ranks.
        spec: what to minimize.

    Returns:
        Scalar sum_T w_T * loss_T over local tokens. `actor/pg_loss`, `actor/kl_loss` (before its
        coefficient) and `actor/loss` add up to their value for the minibatch; `actor/entropy` is a
        mean over trained tokens.
    """
    mask_T = inputs.segments.mask_T
    w_T = token_weights(spec.agg_mode, inputs.segments, denominators, spec.loss_scale_factor)
    if spec.policy_loss.applies_rollout_weights:
        inputs = replace(inputs, rollout_weights_T=rollout_weights_T)
    inputs = inputs.trained_only()
    policy = spec.policy_loss.compute(inputs, spec.options)
    loss_T = policy.loss_T
    if rollout_weights_T is not None and not spec.policy_loss.applies_rollout_weights:
        loss_T = loss_T * torch.where(mask_T, rollout_weights_T, 1.0)
    objective = pg_loss = (w_T * loss_T).sum()
    metrics: Metrics = {"actor/pg_loss": share(pg_loss.detach()), **policy.metrics}
    if spec.needs_old_logprobs:
        metrics |= ratio_metrics(inputs.log_ratio_T, mask_T)
    if spec.kl_loss_type is not None:
        assert ref_logprobs_T is not None, "a KL term needs ref_logprobs"
        ref_logprobs_T = torch.where(mask_T, ref_logprobs_T, 0.0)
        kl_loss = (w_T * kl_penalty(inputs.logprobs_T, ref_logprobs_T, spec.kl_loss_type)).sum()
        objective = objective + spec.kl_loss_coef * kl_loss
        metrics["actor/kl_loss"] = share(kl_loss.detach())
    if spec.needs_entropy:
        assert entropy_T is not None, "an entropy bonus needs the entropy"
        bonus = (w_T * torch.where(mask_T, entropy_T, 0.0)).sum()
        objective = objective - spec.entropy_coeff * bonus
    if entropy_T is not None:
        metrics["actor/entropy"] = masked_mean(entropy_T, mask_T)
    metrics["actor/loss"] = share(objective.detach())
    return objective, metrics


def sft_objective(
    logprobs_T: Tensor, segments: Segments, denominators: Denominators
) -> tuple[Tensor, Metrics]:
    """Return this micro-batch's part of the mean negative log-likelihood per trained token.

    Args:
        logprobs_T: [T] float; values on untrained tokens do not matter.
        segments: of the T tokens.
        denominators: counts over the whole minibatch and all data-parallel ranks.

    Returns:
        Scalar sum_T w_T * loss_T over local tokens, and `sft/loss`, which adds up to the mean.
    """
    w_T = token_weights("token-mean", segments, denominators)
    loss = (w_T * sft(torch.where(segments.mask_T, logprobs_T, 0.0))).sum()
    return loss, {"sft/loss": share(loss.detach())}
