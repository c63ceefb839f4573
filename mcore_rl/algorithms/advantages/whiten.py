"""Standard scores over all trained tokens of a batch. Shapes: T tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_rl.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON = 1e-8


def whiten(x_T: Tensor, mask_T: Tensor) -> Tensor:
    """Return (x - mean) / sqrt(variance + 1e-8) over the tokens of `mask_T`, [T]; elsewhere 0.

    The variance is unbiased. Where all tokens have one value, the result is exactly 0.

    Args:
        x_T: [T] float64; values outside the mask do not matter.
        mask_T: [T] bool.
    """
    values = x_T[mask_T]
    whitened_T = torch.zeros_like(x_T)
    if len(values) > 1 and values.min() < values.max():
        whitened_T[mask_T] = (values - values.mean()) / (values.var() + _EPSILON).sqrt()
    return whitened_T
