"""KL against the reference as part of the reward, before advantages (`use_kl_in_reward`).

    r_i -= kl_coef * sum_t kl(old_logprob_t, ref_logprob_t)

The sum runs over the trained tokens of sample i; with the default estimator, k1, it is the log of
the ratio of the whole response's probabilities. The coefficient is fixed or follows a target.

Source: arXiv:2512.21852 (k1 in the reward); arXiv:1909.08593, section 2.2 (adaptive coefficient).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from mcore_rl.algorithms.kl import kl_penalty
from mcore_rl.errors import refuse_unread, require, require_one_of
from mcore_rl.metrics import Metrics, mean
from mcore_rl.segments import Segments, end_to_end
from mcore_rl.types import Sample, SampleGroup

_MAX_ADAPTIVE_ERROR = 0.2


@dataclass(kw_only=True, slots=True)
class KlCtrlConfig:
    """Coefficient of the KL in the reward (`algorithm.kl_ctrl`)."""

    type: str = "fixed"
    """"fixed", or "adaptive": steered towards `target_kl`."""
    kl_coef: float = 0.001
    """The coefficient; where an adaptive one begins."""
    horizon: int = 10000
    """Adaptive only: samples over which a 20 percent correction applies in full."""
    target_kl: float = 0.1
    """Adaptive only: KL per token to hold."""

    def __post_init__(self) -> None:
        require_one_of("algorithm.kl_ctrl.type", self.type, ("fixed", "adaptive"))
        require(self.kl_coef >= 0, "algorithm.kl_ctrl.kl_coef", self.kl_coef, "must be >= 0")
        require(self.horizon > 0, "algorithm.kl_ctrl.horizon", self.horizon, "must be > 0")
        require(self.target_kl > 0, "algorithm.kl_ctrl.target_kl", self.target_kl, "must be > 0")
        if self.type == "fixed":
            refuse_unread(self, "algorithm.kl_ctrl", ("horizon", "target_kl"), "type=fixed")

    def min_horizon(self, num_samples: int) -> int:
        """Return the least horizon with which no step of so many samples takes the coefficient to
        0 or below."""
        return math.floor(_MAX_ADAPTIVE_ERROR * num_samples) + 1


def penalize_rewards(
    groups: Sequence[SampleGroup], kl_coef: float, kind: str
) -> tuple[list[SampleGroup], float]:
    """Return copies with `kl_coef` times the summed KL taken off each sample's reward.

    Args:
        groups: their samples hold `old_logprobs` and `ref_logprobs`.
        kl_coef: weight of the penalty.
        kind: estimator, one of `kl.KL_VALUES`.

    Returns:
        The groups, and the KL per token: its mean over each sample's trained tokens, averaged over
        the samples that have any (0.0 if none has).
    """
    samples = [sample for group in groups for sample in group.samples]
    segments = Segments.from_loss_masks([sample.loss_mask for sample in samples])
    kl_T = kl_penalty(
        end_to_end([sample.old_logprobs for sample in samples]),
        end_to_end([sample.ref_logprobs for sample in samples]),
        kind,
    )
    num_trained = max(int((segments.num_tokens_S > 0).sum()), 1)
    penalty_S = cast("list[float]", (kl_coef * segments.sum(kl_T)).tolist())  # pyright: ignore[reportUnknownMemberType]
    penalties = iter(penalty_S)
    penalized = [
        replace(group, samples=[_take_off(sample, penalties) for sample in group.samples])
        for group in groups
    ]
    return penalized, float(segments.mean(kl_T).sum()) / num_trained


class KlController:
    """Applies the KL penalty with a coefficient that it owns; state survives a resume."""

    def __init__(self, cfg: KlCtrlConfig, kind: str) -> None:
        self._cfg, self._kind = cfg, kind
        self.kl_coef = cfg.kl_coef

    def penalize(self, groups: Sequence[SampleGroup]) -> tuple[list[SampleGroup], Metrics]:
        """Return the groups with penalized rewards, then move the coefficient by what was seen."""
        groups, kl = penalize_rewards(groups, self.kl_coef, self._kind)
        metrics = {"reward/kl": mean(kl), "reward/kl_coef": mean(self.kl_coef)}
        self.update(kl, sum(len(group.samples) for group in groups))
        return groups, metrics

    def update(self, kl: float, num_samples: int) -> None:
        """Move an adaptive coefficient; a fixed one stays.

        kl_coef *= 1 + clip(kl / target_kl - 1, -0.2, 0.2) * num_samples / horizon

        A KL that is not finite moves nothing: the optimizer skips the updates of such a step, while
        a coefficient of NaN would stay and spoil the rewards of all later steps.
        """
        if self._cfg.type == "adaptive" and math.isfinite(kl):
            error = kl / self._cfg.target_kl - 1
            error = min(max(error, -_MAX_ADAPTIVE_ERROR), _MAX_ADAPTIVE_ERROR)
            self.kl_coef *= 1 + error * num_samples / self._cfg.horizon

    def state_dict(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.kl_coef = state["kl_coef"]


def _take_off(sample: Sample, penalties: Iterator[float]) -> Sample:
    return replace(sample, reward=sample.reward - next(penalties))
