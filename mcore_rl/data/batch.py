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

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mcore_rl.segments import Segments
from mcore_rl.types import NUMBERS, MicroBatch, Numbers, TokenSequence


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

    @property
    def real_positions(self) -> np.ndarray:
        """[positions without padding] int64, where they lie in the whole row, in order."""
        num_positions_S = np.array(self.lengths, np.int64) - 1
        starts_S = self.cu_seqlens_padded.cpu().numpy()[: len(self.lengths)]
        shift_S = starts_S - (num_positions_S.cumsum() - num_positions_S)
        shift_T = shift_S.repeat(num_positions_S)
        return cast("np.ndarray", np.arange(num_positions_S.sum()) + shift_T)


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
        micro_batch: may be empty.
        pad_token_id: any valid token.
        device: of the tensors.
        align_sequence: positions of a sequence are a multiple of it (2 * cp for context
            parallelism).
        align_total: T is a multiple of it (tp * cp for sequence parallelism).
    """
    batch = micro_batch if len(micro_batch.lengths) else _placeholder(pad_token_id)
    num_positions_S = batch.lengths.astype(np.int64) - 1
    assert num_positions_S.min() >= 0, "a sequence without tokens has no first token"
    padded_S = np.maximum(1, -(-num_positions_S // align_sequence)) * align_sequence
    padded_S[-1] += -padded_S.sum() % math.lcm(align_sequence, align_total)
    ends_S = padded_S.cumsum()
    starts_S, num_rows = ends_S - padded_S, int(ends_S[-1])
    position_T = np.arange(num_rows) - starts_S.repeat(padded_S)
    is_real_T = position_T < num_positions_S.repeat(padded_S)
    is_label_N = _is_label(batch.lengths)
    is_input_N = np.append(is_label_N[1:], False)  # the last token of each sequence is none

    def row(
        x_N: np.ndarray, is_taken_N: np.ndarray, fill: float, dtype: npt.DTypeLike
    ) -> np.ndarray:
        assert len(x_N) == len(is_taken_N), "what a sequence carries is not as long as token_ids"
        x_T = np.full(num_rows, fill, dtype)
        x_T[is_real_T] = x_N[is_taken_N]
        return x_T

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device)  # pyright: ignore[reportUnknownMemberType]

    def boundaries(counts_S: np.ndarray) -> Tensor:
        return tensor(np.append(0, counts_S.cumsum()).astype(np.int32))

    optional = {
        f"{name}_T": tensor(row(x_N, is_label_N, 0.0, np.float32))
        for name in NUMBERS
        if (x_N := getattr(batch, name)) is not None
    }
    if batch.routed_experts is not None:
        routes_TLK = np.full((num_rows, *batch.routed_experts.shape[1:]), -1, np.int16)
        routes_TLK[is_real_T] = batch.routed_experts
        optional["routed_experts_TLK"] = tensor(routes_TLK)
    mask_T = row(batch.loss_mask, is_label_N, False, np.bool_)
    num_tokens_S = np.add.reduceat(mask_T, starts_S, dtype=np.int64)
    return PackedBatch(
        input_ids_T=tensor(row(batch.token_ids, is_input_N, pad_token_id, np.int64)),
        labels_T=tensor(row(batch.token_ids, is_label_N, pad_token_id, np.int64)),
        position_ids_T=tensor(position_T),
        segments=Segments(
            sequence_T=tensor(np.arange(len(padded_S)).repeat(padded_S)),
            mask_T=tensor(mask_T),
            num_tokens_S=tensor(num_tokens_S.astype(np.float32)),
        ),
        cu_seqlens=boundaries(num_positions_S),
        cu_seqlens_padded=boundaries(padded_S),
        max_seqlen=int(padded_S.max()),
        lengths=tuple(micro_batch.lengths.tolist()),
        **optional,
    )


def unpack(values_T: Tensor, batch: PackedBatch) -> Numbers:
    """Return the values of all sequences end to end, as long as their `token_ids`: the inverse
    shift.

    The value of a prediction goes to the token it predicts. The first token, which nothing
    predicts, and tokens that do not train get 0.0; padding is dropped.

    Args:
        values_T: [T] of any float dtype, a value per position of `batch`.
        batch: the whole row that the values belong to.
    """
    values = torch.where(batch.mask_T, values_T.detach(), 0.0).float().cpu().numpy()
    is_label_N = _is_label(np.array(batch.lengths, np.int64))
    numbers_N = np.zeros(len(is_label_N), np.float32)
    numbers_N[is_label_N] = values[batch.real_positions]
    return numbers_N


def _is_label(lengths_S: np.ndarray) -> np.ndarray:
    """Return which tokens of sequences that lie end to end are predicted, [N] bool: all but the
    first of each."""
    is_label_N = np.ones(lengths_S.sum(), np.bool_)
    is_label_N[lengths_S.cumsum() - lengths_S] = False
    return is_label_N


def _placeholder(pad_token_id: int) -> MicroBatch:
    sequence = TokenSequence(
        token_ids=np.full(2, pad_token_id, np.int32),
        loss_mask=np.zeros(2, np.bool_),
        **dict.fromkeys(NUMBERS, np.zeros(2, np.float32)),
    )
    return MicroBatch.of([sequence])
