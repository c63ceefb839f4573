"""Rotary embedding of packed rows, on every device: angles once a row, not once a call.

Megatron's own reads a row's boundaries on the host, cuts the row, gathers its angles and takes
their cosines for the queries and again for the keys of every layer. On CUDA each reading waits for
the device. Here cosines and sines of a row are made at its first call and kept with its boundaries.
The numbers are Megatron's, bit for bit.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.transformer import attention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from mcore_rl.megatron.context_parallel import local_positions, row_boundaries


def install() -> None:
    """Have Megatron's attention call `packed_rotary`."""
    if not hasattr(attention, "apply_rotary_pos_emb"):
        raise RuntimeError(
            "megatron.core.transformer.attention has no apply_rotary_pos_emb: "
            "mcore_rl/megatron/rotary.py needs an update"
        )
    attention.apply_rotary_pos_emb = packed_rotary


class _Turns(NamedTuple):
    """The cosines and sines of a row, and what they are of."""

    freqs: Tensor
    mscale: float
    dtype: torch.dtype
    cos_L1R: Tensor
    sin_L1R: Tensor


def packed_rotary(
    t: Tensor,
    freqs: Tensor,
    config: TransformerConfig,
    cu_seqlens: Tensor | None = None,
    mscale: float = 1.0,
    cp_group: ProcessGroup | None = None,
    **options: Any,
) -> Tensor:
    """Return queries or keys turned by the angles of their positions, [L, heads, d].

    Args:
        t: [L, heads, d] float, this rank's part of the row.
        freqs: [longest sequence, 1, 1, R] float32 angles; the first R of the d numbers are turned.
        config: Megatron's. What it asks for beyond plain halves goes to Megatron's own function.
        cu_seqlens: boundaries of the whole row; the same tensor in all layers.
        mscale: factor on cosines and sines (YaRN).
        cp_group: context parallel.
        options: of a later Megatron-Core; passed on.
    """
    special = config.apply_rope_fusion or config.rotary_interleaved or config.multi_latent_attention
    if cu_seqlens is None or cp_group is None or special or options:
        megatrons: Any = apply_rotary_pos_emb  # takes None where its annotation does not
        return megatrons(t, freqs, config, cu_seqlens, mscale, cp_group, **options)
    turns: _Turns | None = getattr(cu_seqlens, "turns", None)
    if turns is None or turns.freqs is not freqs or turns[1:3] != (mscale, t.dtype):
        turns = _turns(freqs, mscale, t.dtype, cu_seqlens, cp_group)
        cu_seqlens.turns = turns  # pyright: ignore[reportAttributeAccessIssue]
    turned: Any = _Turn.apply(t, turns.cos_L1R, turns.sin_L1R)
    return turned


class _Turn(torch.autograd.Function):
    """The gradient is turned back by the same angles; autograd would join its halves again."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos_L1R: Tensor, sin_L1R: Tensor) -> Tensor:
        ctx.save_for_backward(cos_L1R, sin_L1R)
        return _turned(t, cos_L1R, sin_L1R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos_L1R, sin_L1R = ctx.saved_tensors
        return _turned(grads[0], cos_L1R, -sin_L1R), None, None


def _turned(t: Tensor, cos_L1R: Tensor, sin_L1R: Tensor) -> Tensor:
    """Return `t` with its first R numbers as (left cos - right sin, right cos + left sin)."""
    size = cos_L1R.shape[-1]
    output = torch.empty_like(t, memory_format=torch.contiguous_format)
    torch.mul(t[..., :size], cos_L1R, out=output[..., :size])
    left, right = t[..., :size].chunk(2, dim=-1)
    left_sin, right_sin = sin_L1R.chunk(2, dim=-1)
    output[..., : size // 2].sub_(right * left_sin)
    output[..., size // 2 : size].add_(left * right_sin)
    output[..., size:] = t[..., size:]
    return output


def _turns(
    freqs: Tensor, mscale: float, dtype: torch.dtype, cu_seqlens: Tensor, cp_group: ProcessGroup
) -> _Turns:
    boundaries = row_boundaries(cu_seqlens)
    starts = torch.cat(
        [torch.full((stop - start,), start) for start, stop in itertools.pairwise(boundaries)]
    )
    positions = torch.arange(boundaries[-1]) - starts
    if cp_group.size() > 1:
        positions = positions[local_positions(boundaries, cp_group.rank(), cp_group.size())]
    angles_L1R = freqs[positions.to(freqs.device), 0]
    cos, sin = ((turn(angles_L1R) * mscale).to(dtype) for turn in (torch.cos, torch.sin))
    return _Turns(freqs, mscale, dtype, cos, sin)
