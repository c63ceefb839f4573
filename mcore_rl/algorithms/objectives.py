"""What a minibatch minimizes, as an object that travels from the loop to the train workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mcore_rl.algorithms.aggregate import token_weights
from mcore_rl.algorithms.corrections import (
    RolloutCorrectionConfig,
    mismatch_metrics,
    rollout_weights,
)
from mcore_rl.algorithms.losses.base import PolicyLossInputs
from mcore_rl.algorithms.losses.value_clip import value_clip
from mcore_rl.algorithms.objective import ActorObjective, actor_objective, sft_objective
from mcore_rl.lazy_torch import torch
from mcore_rl.metrics import Metrics, masked_mean, share
from mcore_rl.segments import Segments
from mcore_rl.types import Denominators

if TYPE_CHECKING:
    from torch import Tensor


class PackedRow(Protocol):
    """What an objective reads of a micro-batch; `data.batch.PackedBatch` has it."""

    @property
    def segments(self) -> Segments: ...
    @property
    def mask_T(self) -> Tensor: ...
    @property
    def advantages_T(self) -> Tensor | None: ...
    @property
    def old_logprobs_T(self) -> Tensor | None: ...
    @property
    def rollout_logprobs_T(self) -> Tensor | None: ...
    @property
    def ref_logprobs_T(self) -> Tensor | None: ...
    @property
    def values_T(self) -> Tensor | None: ...
    @property
    def returns_T(self) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """The objective of reinforcement learning.

    Sequences without `old_logprobs` are trained before any weight of the step changed, so this
    forward's own logprobs are the old ones and the ratio is 1. Where a sequence carries the
    engine's logprobs, the old ones are compared with them (`mismatch/*`) and, with `correction`,
    their ratio weighs the loss.
    """

    spec: ActorObjective
    log_entropy: bool
    correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)

    @property
    def with_entropy(self) -> bool:
        return self.log_entropy or self.spec.needs_entropy

    @property
    def needs_old_logprobs(self) -> bool:
        return self.spec.needs_old_logprobs or self.correction.is_on

    def __call__(
        self,
        logprobs_T: Tensor,
        entropy_T: Tensor | None,
        batch: PackedRow,
        denominators: Denominators,
    ) -> tuple[Tensor, Metrics]:
        assert batch.advantages_T is not None, "policy losses need advantages"
        old_logprobs_T = batch.old_logprobs_T
        if old_logprobs_T is None:
            old_logprobs_T = logprobs_T.detach()
        weights_T, weight_metrics = None, Metrics()
        if self.correction.is_on:
            assert batch.rollout_logprobs_T is not None, "a correction needs the engine's logprobs"
            weights_T, weight_metrics = rollout_weights(
                old_logprobs_T, batch.rollout_logprobs_T, batch.segments, self.correction
            )
        objective, metrics = actor_objective(
            PolicyLossInputs(
                logprobs_T=logprobs_T,
                advantages_T=batch.advantages_T,
                segments=batch.segments,
                old_logprobs_T=old_logprobs_T,
            ),
            rollout_weights_T=weights_T,
            entropy_T=entropy_T,
            ref_logprobs_T=batch.ref_logprobs_T,
            denominators=denominators,
            spec=self.spec,
        )
        if batch.rollout_logprobs_T is not None:
            metrics |= mismatch_metrics(old_logprobs_T, batch.rollout_logprobs_T, batch.mask_T)
        return objective, metrics | weight_metrics


@dataclass(frozen=True, slots=True)
class CriticObjective:
    """The clipped squared distance of the critic's values to their returns."""

    cliprange_value: float
    agg_mode: str
    loss_scale_factor: float
    """Constant of seq-mean-token-sum-norm, in tokens; the other aggregations do not read it."""
    with_entropy: bool = False

    def __call__(
        self,
        values_T: Tensor,
        entropy_T: Tensor | None,
        batch: PackedRow,
        denominators: Denominators,
    ) -> tuple[Tensor, Metrics]:
        assert batch.values_T is not None and batch.returns_T is not None
        mask_T = batch.mask_T
        loss_T, clipped_T = value_clip(
            # Values of padding are finite, but they do not matter and shall not.
            torch.where(mask_T, values_T, 0.0),
            batch.values_T,
            batch.returns_T,
            self.cliprange_value,
        )
        w_T = token_weights(self.agg_mode, batch.segments, denominators, self.loss_scale_factor)
        loss = (w_T * loss_T).sum()
        return loss, {
            "critic/value_loss": share(loss.detach()),
            "critic/clip_frac": masked_mean(clipped_T, mask_T),
        }


@dataclass(frozen=True, slots=True)
class SftObjective:
    """Mean negative log-likelihood of the trained tokens."""

    with_entropy: bool = False

    def __call__(
        self,
        logprobs_T: Tensor,
        entropy_T: Tensor | None,
        batch: PackedRow,
        denominators: Denominators,
    ) -> tuple[Tensor, Metrics]:
        return sft_objective(logprobs_T, batch.segments, denominators)
