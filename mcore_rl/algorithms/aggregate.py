"""How token losses become one number: the `loss_agg_mode`s, as a weight per token.

    objective = sum_T w_T * loss_T      over all micro-batches and ranks of the minibatch

A minibatch has one objective, whatever it is cut into. So every count in a weight is taken over
the whole minibatch and all data-parallel ranks (`Denominators`, fixed on the host when it is
planned) or over a whole sequence (`Segments.num_tokens_S`), never over what happens to lie in one
micro-batch. Nothing else in this package averages or masks token losses.

Example: sequences of 3 and 1 trained tokens.

    token-mean               1/4 1/4 1/4 | 1/4
    token-sum                1   1   1   | 1
    seq-mean-token-sum       1/2 1/2 1/2 | 1/2
    seq-mean-token-mean      1/6 1/6 1/6 | 1/2
    seq-mean-token-sum-norm  1/2F ...    | 1/2F      F = loss_scale_factor
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_rl.errors import require_one_of
from mcore_rl.segments import Segments
from mcore_rl.types import Denominators

if TYPE_CHECKING:
    from torch import Tensor

SCALED_AGG_MODE = "seq-mean-token-sum-norm"
"""The mode that divides by `loss_scale_factor` (Dr.GRPO, arXiv:2503.20783); no other reads it."""

AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    SCALED_AGG_MODE,
)


def token_weights(
    mode: str,
    segments: Segments,
    denominators: Denominators,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """Return the weight of each token's loss, [T], in the dtype of `segments.num_tokens_S`.

    Untrained tokens weigh 0. A minibatch without trained tokens has weights 0, not NaN.

    Args:
        mode: one of `AGG_MODES`.
        segments: the T tokens of this micro-batch.
        denominators: counts over the whole minibatch and all data-parallel ranks.
        loss_scale_factor: constant of `seq-mean-token-sum-norm`, not read by the other modes.

    Raises:
        UserError: if `mode` is unknown.
    """
    require_one_of("actor.loss_agg_mode", mode, AGG_MODES)
    num_tokens, num_sequences = max(denominators.num_tokens, 1), max(denominators.num_sequences, 1)
    ones_S = segments.num_tokens_S.new_ones(segments.num_tokens_S.shape)
    if mode == "token-mean":
        weight_S = ones_S / num_tokens
    elif mode == "token-sum":
        weight_S = ones_S
    elif mode == "seq-mean-token-sum":
        weight_S = ones_S / num_sequences
    elif mode == "seq-mean-token-mean":
        weight_S = ones_S / num_sequences / segments.num_tokens_S.clamp(min=1)
    else:
        assert loss_scale_factor is not None, f"{SCALED_AGG_MODE} needs loss_scale_factor"
        weight_S = ones_S / num_sequences / loss_scale_factor
    return segments.expand(weight_S)
