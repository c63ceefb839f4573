"""GSPO's loss: PPO's clipped loss with the ratio of the whole sequence, length-normalized.

    log s_i = mean_t (logprob - old_logprob)
    s_t = exp(min(logprob - sg(logprob) + sg(log s_i), 10))        sg: no gradient
    l = max(-A s_t, -A clip(s_t, 1 - low, 1 + high))

Every token has the value of its sequence's ratio and a gradient of its own (GSPO-token), so
advantages may differ within a sequence; where they do not, it is GSPO.

Source: GSPO, arXiv:2507.18071, eq. 5 and 13-14. Shapes: T packed tokens on this rank, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mcore_rl.algorithms.losses.base import POLICY_LOSSES, ClipConfig, PolicyLossInputs, TokenLoss
from mcore_rl.algorithms.ratio import probability_ratio
from mcore_rl.lazy_torch import torch
from mcore_rl.metrics import masked_max, masked_mean, masked_min

_MAX_LOG_RATIO = 10.0


@dataclass(kw_only=True)
class GspoConfig(ClipConfig):
    """Options of gspo: bounds on the distance of the sequence's ratio from 1."""

    LOW: ClassVar[float] = 3e-4
    HIGH: ClassVar[float] = 4e-4


@POLICY_LOSSES.register("gspo", config=GspoConfig, agg_mode="seq-mean-token-mean")
def gspo(inputs: PolicyLossInputs, cfg: GspoConfig) -> TokenLoss:
    """Return the clipped loss, [T], unreduced."""
    segments, logprobs_T, advantages_T = inputs.segments, inputs.logprobs_T, inputs.advantages_T
    log_ratio_S = segments.mean(inputs.log_ratio_T.detach())
    log_ratio_T = segments.expand(log_ratio_S) + (logprobs_T - logprobs_T.detach())
    ratio_T = log_ratio_T.clamp(max=_MAX_LOG_RATIO).exp()
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - cfg.low, 1 + cfg.high)
    seq_ratio_S, trained_S = probability_ratio(log_ratio_S), segments.num_tokens_S > 0
    return TokenLoss(
        torch.maximum(plain_T, clipped_T),
        {
            "actor/clip_frac": masked_mean(clipped_T > plain_T, segments.mask_T),
            "actor/seq_ratio/max": masked_max(seq_ratio_S, trained_S),
            "actor/seq_ratio/min": masked_min(seq_ratio_S, trained_S),
        },
    )
