"""Ratios of probabilities, `exp` of a difference of logprobs, kept finite; and their metrics.

Shapes: T packed tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_rl.metrics import Metrics, masked_max, masked_mean, masked_min

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut to +-20 before `exp`, so one absurd token cannot overflow float32."""


def probability_ratio(log_ratio_T: Tensor) -> Tensor:
    """Return exp(clamp(log_ratio_T, -20, 20)), [T]; a cut token passes no gradient."""
    return log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def ratio_metrics(log_ratio_T: Tensor, mask_T: Tensor) -> Metrics:
    """Return how far the policy moved since `old_logprobs`, over the tokens of `mask_T` [T] bool.

    `actor/ppo_kl` is the k1 estimate of KL(old || new): the mean of -log_ratio.
    """
    ratio_T = probability_ratio(log_ratio_T)
    return {
        "actor/ppo_kl": masked_mean(-log_ratio_T, mask_T),
        "actor/ratio/mean": masked_mean(ratio_T, mask_T),
        "actor/ratio/max": masked_max(ratio_T, mask_T),
        "actor/ratio/min": masked_min(ratio_T, mask_T),
    }
