"""GAE: PPO's advantages from the values of a critic, whitened over the batch.

    delta_t  = r_t + gamma * V_{t+1} - V_t
    A_t      = delta_t + gamma * lam * A_{t+1}
    return_t = A_t + V_t                    (what the critic learns)

t runs over the trained tokens of a sample; V after the last of them is 0, also where the response
was cut off. The reward of the sample, KL included, is that of its last trained token.
Source: arXiv:1506.02438, arXiv:1707.06347. Shapes: N samples, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AdvantageInputs
from mcore_rl.algorithms.advantages.whiten import whiten
from mcore_rl.errors import require
from mcore_rl.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True, slots=True)
class GaeConfig:
    """Options of gae."""

    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """How far rewards reach back past the critic's values; 0: one token, 1: all the way."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"algorithm.{name}", value, "must be in [0, 1]")


def lambda_returns(inputs: AdvantageInputs, cfg: GaeConfig) -> Tensor:
    """Return what the critic should have given for each token, [T] float64."""
    assert inputs.values_T is not None, "gae needs the values of a critic"
    mask_T = inputs.segments.mask_T
    return torch.where(mask_T, raw_advantages(inputs, cfg) + inputs.values_T, 0.0)


@ADVANTAGES.register("gae", config=GaeConfig, returns=lambda_returns)
def gae(inputs: AdvantageInputs, cfg: GaeConfig) -> Tensor:
    """Return the whitened advantage of each token, [T] float64."""
    return whiten(raw_advantages(inputs, cfg), inputs.segments.mask_T)


def raw_advantages(inputs: AdvantageInputs, cfg: GaeConfig) -> Tensor:
    """Return the advantage of each token before whitening, [T] float64."""
    assert inputs.values_T is not None, "gae needs the values of a critic"
    mask_T = inputs.segments.mask_T
    # From here on a sample is its trained tokens, at `last_N` the last of them.
    values = inputs.values_T[mask_T]
    length_N = inputs.segments.num_tokens_S.long()
    has_tokens_N = length_N > 0
    last_N = (length_N.cumsum(0) - 1)[has_tokens_N]
    rewards = torch.zeros_like(values)
    rewards[last_N] = inputs.rewards_N[has_tokens_N]
    next_values = torch.cat([values[1:], values.new_zeros(1)])
    next_values[last_N] = 0.0
    delta = rewards + cfg.gamma * next_values - values
    # All samples are walked at once from their last token to their first. Longest first, so that
    # those that go on are at the front.
    length_N, order_N = length_N[has_tokens_N].sort(descending=True)
    token_N, carried_N = last_N[order_N], delta.new_zeros(len(order_N))
    num_longer = len(length_N) - length_N.bincount().cumsum(0)  # than 0, 1, .. tokens
    advantages = torch.zeros_like(delta)
    counts = cast("list[int]", num_longer[:-1].tolist())  # pyright: ignore[reportUnknownMemberType]
    for num_left in counts:
        token_N, carried_N = token_N[:num_left], carried_N[:num_left]
        carried_N = delta[token_N] + cfg.gamma * cfg.lam * carried_N
        advantages[token_N] = carried_N
        token_N = token_N - 1
    advantages_T = torch.zeros_like(inputs.values_T)
    advantages_T[mask_T] = advantages
    return advantages_T
