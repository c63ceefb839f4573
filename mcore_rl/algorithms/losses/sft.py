"""Supervised loss: the negative log-likelihood of each token.

Not a policy loss: it reads no advantages and is not in the registry; `objective.sft_objective`
aggregates it. Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def sft(logprobs_T: Tensor) -> Tensor:
    """Return -logprobs_T, [T], in nats, unreduced."""
    return -logprobs_T
