"""GPG's loss: the plain policy gradient, l = -A logprob, without ratio, clip or old logprobs.

Source: GPG, arXiv:2504.02546, eq. 7. Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

from mcore_rl.algorithms.losses.base import (
    POLICY_LOSSES,
    ClipBounds,
    PolicyLoss,
    PolicyLossInputs,
    TokenLoss,
)


def gpg(inputs: PolicyLossInputs, clip: ClipBounds) -> TokenLoss:
    """Return the policy-gradient loss, [T], unreduced; `clip` has no bounds."""
    return TokenLoss(inputs.rollout_weighted(-inputs.advantages_T * inputs.logprobs_T), {})


POLICY_LOSSES.add("gpg", PolicyLoss(compute=gpg, needs_old_logprobs=False))
