"""GPG's loss: the plain policy gradient, l = -A logprob, without ratio, clip or old logprobs.

Source: GPG, arXiv:2504.02546, eq. 7. Shapes: T packed tokens on this rank.
"""

from __future__ import annotations

from mcore_rl.algorithms.losses.base import POLICY_LOSSES, PolicyLossInputs, TokenLoss
from mcore_rl.options import NoOptions


@POLICY_LOSSES.register("gpg", config=NoOptions, needs_old_logprobs=False)
def gpg(inputs: PolicyLossInputs, cfg: NoOptions) -> TokenLoss:
    """Return the policy-gradient loss, [T], unreduced."""
    return TokenLoss(-inputs.advantages_T * inputs.logprobs_T, {})
