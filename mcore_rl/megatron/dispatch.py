"""Rows on their way to the experts: no copy where they lie in order already.

After the exchange between ranks Megatron sorts rows by local expert, and back after the experts.
Where one rank holds every expert there is nothing to sort, and it copies all rows all the same, in
the forward pass and in the backward pass.
"""

from __future__ import annotations

from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs
from torch import Tensor


def install() -> None:
    """Have Megatron's dispatchers call `sorted_chunks`."""
    if not hasattr(token_dispatcher, "sort_chunks_by_idxs"):
        raise RuntimeError(
            "megatron.core.transformer.moe.token_dispatcher has no sort_chunks_by_idxs: "
            "mcore_rl/megatron/dispatch.py needs an update"
        )
    token_dispatcher.sort_chunks_by_idxs = sorted_chunks


def sorted_chunks(
    rows: Tensor,
    split_sizes: Tensor,
    sorted_idxs: Tensor,
    probs: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return rows and probabilities, chunk by chunk in another order; themselves if it is the same.

    Args:
        rows: [N, H].
        split_sizes: int, [chunks], rows of each.
        sorted_idxs: int, [chunks], the chunk that comes to each place.
        probs: [N], or None.
        fused: by a kernel of Transformer Engine, which reads the order on the device.
    """
    if not fused:
        order = sorted_idxs.tolist()
        if order == sorted(order):
            return rows, probs
    return sort_chunks_by_idxs(rows, split_sizes, sorted_idxs, probs=probs, fused=fused)
