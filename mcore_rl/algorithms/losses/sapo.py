"""SAPO's loss: a smooth gate on the ratio in place of a clip, narrower for negative advantages.

    r = exp(logprob - old_logprob),     tau = tau_pos where A > 0, tau_neg elsewhere
    l = -A sigmoid(tau (r - 1)) 4 / tau

At r = 1 the gradient is that of -A r; away from it the gate lets it fade on both sides, the faster
the larger tau.

Source: SAPO, arXiv:2511.20347, eq. 5-6; its objective is a mean over sequences of means over
tokens. Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.algorithms.losses.base import POLICY_LOSSES, PolicyLossInputs, TokenLoss
from mcore_rl.algorithms.ratio import probability_ratio
from mcore_rl.errors import require
from mcore_rl.lazy_torch import torch


@dataclass(kw_only=True, slots=True)
class SapoConfig:
    """Options of sapo."""

    tau_pos: float = 1.0
    """Temperature of the gate where the advantage is positive."""
    tau_neg: float = 1.05
    """Where it is not."""

    def __post_init__(self) -> None:
        for name in ("tau_pos", "tau_neg"):
            require(getattr(self, name) > 0, f"actor.{name}", getattr(self, name), "must be > 0")


@POLICY_LOSSES.register("sapo", config=SapoConfig, agg_mode="seq-mean-token-mean")
def sapo(inputs: PolicyLossInputs, cfg: SapoConfig) -> TokenLoss:
    """Return the gated loss, [T], unreduced."""
    ratio_T, advantages_T = probability_ratio(inputs.log_ratio_T), inputs.advantages_T
    tau_T = torch.full_like(advantages_T, cfg.tau_neg).masked_fill(advantages_T > 0, cfg.tau_pos)
    loss_T = -advantages_T * torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T
    return TokenLoss(loss_T, {})
