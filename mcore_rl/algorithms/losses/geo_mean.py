"""GMPO's loss: the geometric mean of a sequence's token ratios, clipped per token in log space.

    d = logprob - old_logprob,    A_i = mean advantage of sequence i
    e = min(d, high)  where A_i >= 0,      e = max(d, -low)  where A_i < 0
    l_i = -A_i exp(mean_t e),     objective = sum_i l_i / sequences

The clip is one-sided: it cuts what pushes on in the direction that the advantage already favours,
and nothing else. A cut token passes no gradient but stays in the exponent and in the token count.
The bounds are on logarithms: 0.4 keeps ratios within (exp(-0.4), exp(0.4)) = (0.670, 1.492).
Rollout weights w enter as their geometric mean, l_i times exp(mean_t log w): the loss applies them
itself.

The token loss returned is l_i on every token of the sequence; `seq-mean-token-mean`, the one
aggregation that the loss has, weighs it 1 / (tokens of i * sequences), which gives the objective.

Source: GMPO, arXiv:2507.20673, eq. 4 and algorithm 1. With low != high the paper's algorithm would
bound A < 0 by `high`; this follows the implementations in use (verl, TRL), which bound it by `low`.
Shapes: T packed tokens on this rank, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mcore_rl.algorithms.losses.base import POLICY_LOSSES, ClipConfig, PolicyLossInputs, TokenLoss
from mcore_rl.lazy_torch import torch
from mcore_rl.metrics import masked_max, masked_mean, masked_min


@dataclass(kw_only=True)
class GeoMeanConfig(ClipConfig):
    """Options of geo_mean: bounds on the log-ratio."""

    LOW: ClassVar[float] = 0.4
    HIGH: ClassVar[float] = 0.4


@POLICY_LOSSES.register(
    "geo_mean", config=GeoMeanConfig, agg_mode="seq-mean-token-mean", applies_rollout_weights=True
)
def geo_mean(inputs: PolicyLossInputs, cfg: GeoMeanConfig) -> TokenLoss:
    """Return the sequence's loss on each of its tokens, [T], unreduced."""
    segments, log_ratio_T = inputs.segments, inputs.log_ratio_T
    advantage_S = segments.mean(inputs.advantages_T)
    negative_T = segments.expand(advantage_S) < 0
    cut_T = torch.where(
        negative_T, log_ratio_T.clamp(min=-cfg.low), log_ratio_T.clamp(max=cfg.high)
    )
    ratio_S = segments.mean(cut_T).exp()
    loss_S = -advantage_S * ratio_S
    if inputs.rollout_weights_T is not None:
        loss_S = loss_S * segments.mean(inputs.rollout_weights_T.log()).exp()
    is_cut_T, trained_S = cut_T != log_ratio_T, segments.num_tokens_S > 0
    return TokenLoss(
        segments.expand(loss_S),
        {
            "actor/clip_frac": masked_mean(is_cut_T, segments.mask_T),
            "actor/clip_frac_lower": masked_mean(is_cut_T & negative_T, segments.mask_T),
            "actor/seq_ratio/max": masked_max(ratio_S, trained_S),
            "actor/seq_ratio/min": masked_min(ratio_S, trained_S),
        },
    )
