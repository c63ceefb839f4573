"""Sums over sequences of values that lie packed in one row of tokens.

Every sequence-level quantity (a mean log-ratio, a sequence's weight) goes through `Segments`, so a
loss need not know that context parallelism may have cut its sequences over ranks: a subclass for
that case overrides `sum` alone.

Invariants: untrained tokens take no part, whatever their value (NaN included), and receive 0 from
`expand`; `num_tokens_S` counts the whole sequence, also where this rank holds a part of it.

Shapes: T packed tokens on this rank, S sequences. S may be 0, and a sequence may have no trained
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mcore_rl.lazy_torch import torch
from mcore_rl.types import Numbers

if TYPE_CHECKING:
    from torch import Tensor


def end_to_end(numbers: Sequence[Numbers | None]) -> Tensor:
    """Return the numbers of whole sequences laid end to end, [T] float64; all of them have some."""
    carried = [of_sequence for of_sequence in numbers if of_sequence is not None]
    assert len(carried) == len(numbers), "a sequence does not carry what is read"
    return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *carried]).astype(np.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Which sequence each of T packed tokens belongs to.

    Example: two sequences of 3 and 2 tokens, the first token of each untrained:
    sequence_T = [0, 0, 0, 1, 1], mask_T = [F, T, T, F, T], num_tokens_S = [2, 1].
    """

    sequence_T: Tensor
    """[T] int64 in [0, S); read on trained tokens only."""
    mask_T: Tensor
    """[T] bool, True on tokens that train."""
    num_tokens_S: Tensor
    """[S] float, trained tokens of each whole sequence."""

    @classmethod
    def from_loss_masks(cls, loss_masks: Sequence[npt.ArrayLike]) -> Segments:
        """Return the segments of whole sequences laid end to end, counts in float64.

        The first token of a sequence is never predicted and never trains, whatever its mask says.
        """
        masks = [np.asarray(mask, np.bool_) for mask in loss_masks]
        lengths = np.array([len(mask) for mask in masks], np.int64)
        mask = np.concatenate([np.zeros(0, np.bool_), *masks])
        mask[(lengths.cumsum() - lengths)[lengths > 0]] = False
        num_tokens = [np.count_nonzero(mask[1:]) for mask in masks]
        return cls(
            sequence_T=torch.from_numpy(np.arange(len(lengths)).repeat(lengths)),
            mask_T=torch.from_numpy(mask),
            num_tokens_S=torch.tensor(num_tokens, dtype=torch.float64),
        )

    def sum(self, x_T: Tensor) -> Tensor:
        """Return the sum of `x_T` [T] over the trained tokens of each sequence, [S]."""
        sums = x_T.new_zeros(len(self.num_tokens_S) + 1)
        return sums.index_add(0, self._bucket_T(), x_T)[:-1]

    def mean(self, x_T: Tensor) -> Tensor:
        """Return the mean of `x_T` [T] over the trained tokens of each sequence, [S].

        0 for a sequence without trained tokens.
        """
        sum_S = self.sum(x_T)
        return sum_S / self.num_tokens_S.clamp(min=1).to(sum_S.dtype)

    def expand(self, x_S: Tensor) -> Tensor:
        """Return the value of `x_S` [S] of each token's sequence, [T]; 0 on untrained tokens."""
        return torch.cat([x_S, x_S.new_zeros(1)])[self._bucket_T()]

    def _bucket_T(self) -> Tensor:
        # Untrained tokens share bucket S, which `sum` drops and `expand` fills with 0: their
        # values and gradients vanish without a product 0 * nan, and S = 0 needs no special case.
        return torch.where(self.mask_T, self.sequence_T, len(self.num_tokens_S))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSegments(Segments):
    """Segments of whole sequences that lie end to end on the host, of values without gradients."""

    lengths_S: npt.NDArray[np.int64]
    """[S], tokens of each."""

    @classmethod
    def from_loss_masks(cls, loss_masks: Sequence[npt.ArrayLike]) -> HostSegments:
        """See `Segments`."""
        whole = Segments.from_loss_masks(loss_masks)
        return cls(
            sequence_T=whole.sequence_T,
            mask_T=whole.mask_T,
            num_tokens_S=whole.num_tokens_S,
            lengths_S=np.array([len(np.asarray(mask)) for mask in loss_masks], np.int64),
        )

    def expand(self, x_S: Tensor) -> Tensor:
        """See `Segments`. Each value is repeated: a fifth of the time of a look-up per token."""
        x_T = x_S.numpy().repeat(self.lengths_S)
        x_T[~self.mask_T.numpy()] = 0
        return torch.from_numpy(x_T)
