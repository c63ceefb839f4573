"""Micro-batches to tensors: one packed row of tokens, aligned to the target of each prediction.

This is the one place with the label shift. The model reads tokens[:-1] and predicts tokens[1:], so
a sequence of n tokens becomes n - 1 positions, and every per-token value of the carriers is taken
from [1:]. `unpack` is the inverse.

Shapes: T = packed positions with padding, S = sequences of the row (at least 1).

Invariants:
- a sequence takes a multiple of `align_sequence` positions, at least one multiple, and T is a
  multiple of both alignments; what the row lacks is padding of its last sequence;
- padding has the pad token as input and label, a valid `sequence_T`, mask False and values 0;
- an empty micro-batch becomes one sequence of pad tokens with mask False that carries every
  optional value that a loss reads, so that every rank can run the model and its loss.

Worked example: tokens [7, 8, 9] with loss mask [F, T, T], tokens [5, 6] with [F, T],
`align_sequence=2`, pad token 0.

    input_ids_T     7 8 | 5 0      cu_seqlens         0 2 3
    labels_T        8 9 | 6 0      cu_seqlens_padded  0 2 4
    position_ids_T  0 1 | 0 1      num_tokens_S       2 1
    sequence_T      0 0 | 1 1      max_seqlen         2
    mask_T          T T | T F

It does not cut rows for context parallelism (`megatron/context_parallel.py` does).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mcore_rl.segments import Segments
from mcore_rl.types import MicroBatch, TokenSequence

_OPTIONAL = (
    "rollout_logprobs",
    "advantages",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "returns",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch as device tensors."""

    input_ids_T: Tensor
    """[T] int64."""
    labels_T: Tensor
    """[T] int64, the token that follows each input."""
    position_ids_T: Tensor
    """[T] int64, restarting at 0 in every sequence and running on through its padding."""
    segments: Segments
    """Which sequence each position belongs to, its padding included, and where the label trains."""
    cu_seqlens: Tensor
    """[S + 1] int32, running total of positions without padding."""
    cu_seqlens_padded: Tensor
    """[S + 1] int32, running total with padding: where each sequence begins in the row."""
    max_seqlen: int
    """Most positions of a sequence, with padding."""
    lengths: tuple[int, ...]
    """Tokens of each sequence of the micro-batch, before the shift; () if it was empty."""
    rollout_logprobs_T: Tensor | None = None
    """[T] float32; this and the following are None where the sequences carry none."""
    advantages_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    values_T: Tensor | None = None
    returns_T: Tensor | None = None
    routed_experts_TLK: Tensor | None = None
    """[T, MoE layers, topk] int16, the experts of each input; -1 for padding: any would do. None
    where the sequences carry none, and in an empty micro-batch."""

    @property
    def mask_T(self) -> Tensor:
        """[T] bool, True where the label trains."""
        return self.segments.mask_T


def pack(
    micro_batch: MicroBatch,
    *,
    pad_token_id: int,
    device: torch.device | str,
    align_sequence: int = 1,
    align_total: int = 1,
) -> PackedBatch:
    """Return the micro-batch as one packed row.

    Args:
        micro_batch: its sequences either all carry an optional value or none does.
        pad_token_id: any valid token.
        device: of the tensors.
        align_sequence: positions of a sequence are a multiple of it (2 * cp for context
            parallelism).
        align_total: T is a multiple of it (tp * cp for sequence parallelism).
    """
    sequences = micro_batch.sequences or [_placeholder(pad_token_id)]
    num_positions = [len(sequence.token_ids) - 1 for sequence in sequences]
    assert min(num_positions) >= 0, "a sequence without tokens has no first token"
    padded = [max(1, math.ceil(n / align_sequence)) * align_sequence for n in num_positions]
    padded[-1] += -sum(padded) % math.lcm(align_sequence, align_total)

    def row(values: Callable[[TokenSequence], Sequence], fill: object, dtype: torch.dtype):
        positions: list = []
        for sequence, n, length in zip(sequences, num_positions, padded, strict=True):
            items = values(sequence)
            assert len(items) == n, "a per-token list is not as long as token_ids"
            positions += [*items, *[fill] * (length - n)]
        return torch.tensor(positions, dtype=dtype, device=device)

    def per_position(counts: Sequence[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)

    optional = {
        f"{name}_T": row(lambda s, name=name: getattr(s, name)[1:], 0.0, torch.float32)
        for name in _OPTIONAL
        if _is_carried(sequences, name)
    }
    if any(sequence.routed_experts is not None for sequence in sequences):
        optional["routed_experts_TLK"] = _routes(sequences, padded).to(device)
    padded_S = torch.tensor(padded, device=device)
    return PackedBatch(
        input_ids_T=row(lambda s: s.token_ids[:-1], pad_token_id, torch.int64),
        labels_T=row(lambda s: s.token_ids[1:], pad_token_id, torch.int64),
        position_ids_T=torch.cat([torch.arange(length, device=device) for length in padded]),
        segments=Segments(
            sequence_T=torch.arange(len(padded), device=device).repeat_interleave(padded_S),
            mask_T=row(lambda s: s.loss_mask[1:], False, torch.bool),
            num_tokens_S=torch.tensor(
                [s.num_trained_tokens for s in sequences], dtype=torch.float32, device=device
            ),
        ),
        cu_seqlens=per_position(num_positions),
        cu_seqlens_padded=per_position(padded),
        max_seqlen=max(padded),
        lengths=tuple(len(sequence.token_ids) for sequence in micro_batch.sequences),
        **optional,
    )


def unpack(values_T: Tensor, batch: PackedBatch) -> list[list[float]]:
    """Return the values of each sequence, as long as its `token_ids`: the inverse shift.

    The value of a prediction goes to the token it predicts. The first token, which nothing
    predicts, and tokens that do not train get 0.0; padding is dropped.

    Args:
        values_T: [T] of any float dtype, a value per position of `batch`.
        batch: the whole row that the values belong to.
    """
    values = torch.where(batch.mask_T, values_T.detach(), 0.0).tolist()
    starts = batch.cu_seqlens_padded.tolist()
    return [
        [0.0, *values[start : start + length - 1]]
        for start, length in zip(starts, batch.lengths, strict=False)
    ]


def _routes(sequences: Sequence[TokenSequence], padded: Sequence[int]) -> Tensor:
    """Return the routes of the row, [T, L, K] int16, with -1 as padding."""
    rows = []
    for sequence, length in zip(sequences, padded, strict=True):
        routes = sequence.routed_experts
        assert routes is not None, "some sequences of a micro-batch carry routes and some do not"
        assert len(routes) == len(sequence.token_ids) - 1, "routes are not one per input"
        padding = np.full((length - len(routes), *routes.shape[1:]), -1, np.int16)
        rows += [routes.astype(np.int16), padding]
    return torch.from_numpy(np.concatenate(rows))


def _placeholder(pad_token_id: int) -> TokenSequence:
    return TokenSequence(
        token_ids=[pad_token_id] * 2,
        loss_mask=[False] * 2,
        **dict.fromkeys(_OPTIONAL, [0.0] * 2),
    )


def _is_carried(sequences: Sequence[TokenSequence], name: str) -> bool:
    carried = {len(getattr(sequence, name)) > 0 for sequence in sequences}
    assert len(carried) == 1, f"some sequences of a micro-batch carry {name} and some do not"
    return carried.pop()
