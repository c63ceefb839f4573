"""The critic's loss: squared distance to the return, PPO's clip around the old value.

    v_clip = clip(v, v_old - eps, v_old + eps)
    loss   = 0.5 * max((v - R)^2, (v_clip - R)^2)

The larger of the two holds back a value that leaves the range: where the clipped one is chosen, its
gradient is 0. Source: arXiv:1707.06347 as implemented by OpenAI baselines (ppo2). Shapes: T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_rl.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor


def value_clip(
    values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Return (loss_T [T] float, clipped_T [T] bool: the value has left the range and is held back).

    Args:
        values_T: [T] float, differentiable.
        old_values_T: [T] float, before the first update of the step.
        returns_T: [T] float.
        cliprange_value: eps, > 0.
    """
    low_T, high_T = old_values_T - cliprange_value, old_values_T + cliprange_value
    error_T = (values_T - returns_T).square()
    clipped_error_T = (values_T.clamp(low_T, high_T) - returns_T).square()
    return 0.5 * torch.maximum(error_T, clipped_error_T), clipped_error_T > error_T
