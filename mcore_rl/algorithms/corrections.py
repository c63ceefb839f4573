"""How far the trainer's logprobs are from the engine's: the `mismatch/*` metrics.

The engine samples with its own kernels and precision, so even right after a weight sync its
probabilities differ a little from the trainer's; a wrong sync or router shows here first. This
file measures; it does not correct.

Shapes: T packed tokens.
"""

from __future__ import annotations

from torch import Tensor

from mcore_rl.algorithms.kl import kl_penalty
from mcore_rl.algorithms.ratio import probability_ratio
from mcore_rl.metrics import Metrics, masked_max, masked_mean


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
