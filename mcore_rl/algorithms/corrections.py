"""How far the trainer's logprobs are from the engine's, measured always, corrected on request.

The engine samples with its own kernels and precision, so even right after a weight sync its
probabilities differ a little from the trainer's; a wrong sync or router shows here first
(`mismatch/*`). `algorithm.rollout_correction` weighs the loss by

    w = p_trainer / p_engine = exp(old_logprob - rollout_logprob)

    rollout_is   min(w, rollout_is_threshold)              truncated importance sampling
    rollout_rs   0 where w is outside the two bounds, otherwise as above (1 without rollout_is)

at one of the levels "token" (w of the token), "sequence" (the product over its sequence) and,
rollout_rs only, "geometric" (the product's root: exp of the mean of log w). What is rejected
weighs 0 and stays in every denominator, so the objective does not depend on how it is cut.
IcePop is both at the level of tokens with rollout_is_threshold = rollout_rs_threshold = 5 and
rollout_rs_threshold_lower = 0.5. The weights multiply the losses of tokens (`objective.py`), except
for a loss that applies them itself: geo_mean takes their geometric mean, so one rejected token
rejects its sequence.

Source: truncation: TIS, Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training"; token rejection: IcePop, Ling team 2025, arXiv:2510.18855.
Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_rl.algorithms.kl import kl_penalty
from mcore_rl.algorithms.ratio import probability_ratio
from mcore_rl.errors import refuse_unread, require, require_one_of
from mcore_rl.lazy_torch import torch
from mcore_rl.metrics import Metrics, masked_max, masked_mean
from mcore_rl.segments import Segments

if TYPE_CHECKING:
    from torch import Tensor

_LEVELS: dict[str, Callable[[Segments, Tensor], Tensor]] = {
    "token": lambda segments, x_T: x_T,
    "sequence": lambda segments, x_T: segments.expand(segments.sum(x_T)),
    "geometric": lambda segments, x_T: segments.expand(segments.mean(x_T)),
}
"""What becomes of the log-ratio of each token, [T] -> [T]."""


@dataclass(kw_only=True, slots=True)
class RolloutCorrectionConfig:
    """Correction for the engine's distribution (`algorithm.rollout_correction`); off by default."""

    rollout_is: str | None = None
    """Weigh by truncated ratios of each "token" or "sequence"."""
    rollout_is_threshold: float = 2.0
    """They are cut to it."""
    rollout_rs: str | None = None
    """Reject by the ratio of each "token" or "sequence", or by its "geometric" mean."""
    rollout_rs_threshold: float | None = None
    """Largest ratio that is not rejected; no default, since it depends on the level."""
    rollout_rs_threshold_lower: float | None = None
    """Smallest; None: 1 / rollout_rs_threshold."""

    def __post_init__(self) -> None:
        section = "algorithm.rollout_correction"
        upper, lower = self.rollout_rs_threshold, self.rollout_rs_threshold_lower
        if self.rollout_is is None:
            refuse_unread(self, section, ["rollout_is_threshold"], "rollout_is=null")
        else:
            require_one_of(f"{section}.rollout_is", self.rollout_is, ("token", "sequence"))
            threshold = self.rollout_is_threshold
            require(threshold > 0, f"{section}.rollout_is_threshold", threshold, "must be > 0")
        if self.rollout_rs is None:
            names = ["rollout_rs_threshold", "rollout_rs_threshold_lower"]
            refuse_unread(self, section, names, "rollout_rs=null")
        else:
            require_one_of(f"{section}.rollout_rs", self.rollout_rs, _LEVELS)
            rule = f"must be set and at least 1 with rollout_rs={self.rollout_rs}"
            is_set = upper is not None and upper >= 1
            require(is_set, f"{section}.rollout_rs_threshold", upper, rule)
            in_range = lower is None or 0 <= lower <= 1
            key = f"{section}.rollout_rs_threshold_lower"
            require(in_range, key, lower, "must be in [0, 1]")

    @property
    def is_on(self) -> bool:
        return self.rollout_is is not None or self.rollout_rs is not None


def rollout_weights(
    logprobs_T: Tensor, rollout_logprobs_T: Tensor, segments: Segments, cfg: RolloutCorrectionConfig
) -> tuple[Tensor, Metrics]:
    """Return the weight of each token's loss, [T] >= 0 without gradient, and what was cut.

    `is_clipped_frac` and `is_rejected_frac` are shares of trained tokens.

    Args:
        logprobs_T: [T] float, by the trainer, under the weights that the engine sampled with;
            values on untrained tokens do not matter.
        rollout_logprobs_T: [T] float, by the engine.
        segments: of the T tokens.
        cfg: at least one of its two corrections is on.
    """
    mask_T = segments.mask_T
    log_ratio_T = torch.where(mask_T, logprobs_T.detach() - rollout_logprobs_T, 0.0)
    weights_T, metrics = torch.ones_like(log_ratio_T), Metrics()
    if cfg.rollout_is is not None:
        ratio_T = probability_ratio(_LEVELS[cfg.rollout_is](segments, log_ratio_T))
        weights_T = ratio_T.clamp(max=cfg.rollout_is_threshold)
        metrics["mismatch/is_clipped_frac"] = masked_mean(weights_T < ratio_T, mask_T)
    if cfg.rollout_rs is not None:
        assert cfg.rollout_rs_threshold is not None
        upper, lower = cfg.rollout_rs_threshold, cfg.rollout_rs_threshold_lower
        lower = 1 / upper if lower is None else lower
        ratio_T = probability_ratio(_LEVELS[cfg.rollout_rs](segments, log_ratio_T))
        rejected_T = (ratio_T > upper) | (ratio_T < lower)
        weights_T = torch.where(rejected_T, 0.0, weights_T)
        metrics["mismatch/is_rejected_frac"] = masked_mean(rejected_T, mask_T)
    return weights_T, metrics


def mismatch_metrics(logprobs_T: Tensor, rollout_logprobs_T: Tensor, mask_T: Tensor) -> Metrics:
    """Return the distance between trainer and engine over the tokens of `mask_T`.

    `k3_kl` estimates KL(engine || trainer), `is_weight` is p_trainer / p_engine (1 when they
    agree; its mean is 1 up to sampling noise when only noise separates them).

    Args:
        logprobs_T: [T] float, by the trainer, under the weights that the engine sampled with.
        rollout_logprobs_T: [T] float, by the engine.
        mask_T: [T] bool, tokens that count.
    """
    logprobs_T = logprobs_T.detach()
    log_ratio_T = logprobs_T - rollout_logprobs_T
    return {
        "mismatch/logprob_abs_diff/mean": masked_mean(log_ratio_T.abs(), mask_T),
        "mismatch/logprob_abs_diff/max": masked_max(log_ratio_T.abs(), mask_T),
        "mismatch/k3_kl": masked_mean(kl_penalty(rollout_logprobs_T, logprobs_T, "k3"), mask_T),
        "mismatch/is_weight/mean": masked_mean(probability_ratio(log_ratio_T), mask_T),
    }
