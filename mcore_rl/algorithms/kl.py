"""Per-token estimators of KL(policy || reference) from the logprobs of sampled tokens.

With x = ref_logprob - logprob:

    k1 = kl          -x                    unbiased, high variance, may be negative
    abs              |x|
    k2 = mse         x^2 / 2               biased; its gradient is that of the true KL
    k3 = low_var_kl  exp(x) - x - 1        unbiased, never negative; x cut to +-20, value to 10

As a loss, the value's gradient is not the gradient of the expected KL (that of k1 has mean zero).
A `+` after any name keeps its value and takes the gradient of k2.

Source: Schulman, "Approximating KL Divergence", 2020; for `+`, arXiv:2512.21852.

Shapes: T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mcore_rl.algorithms.ratio import MAX_LOG_RATIO

if TYPE_CHECKING:
    from torch import Tensor

_MAX_K3 = 10.0


def _k1(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    return logprobs_T - ref_logprobs_T


def _abs(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    return (logprobs_T - ref_logprobs_T).abs()


def _k2(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    return 0.5 * (logprobs_T - ref_logprobs_T).square()


def _k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    x_T = (ref_logprobs_T - logprobs_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    # exp(x) - 1 in float32 loses the digits of a small x: down to -6e-8 where 0 is right.
    return (x_T.expm1() - x_T).clamp(max=_MAX_K3)


_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _k1,
    "k1": _k1,
    "abs": _abs,
    "mse": _k2,
    "k2": _k2,
    "low_var_kl": _k3,
    "k3": _k3,
}

KL_VALUES = tuple(_ESTIMATORS)
"""Names that differ in value: all there is to choose where nothing is differentiated."""

KL_KINDS = (*KL_VALUES, *(f"{name}+" for name in KL_VALUES))
"""Names that differ in value or gradient."""


def kl_penalty(logprobs_T: Tensor, ref_logprobs_T: Tensor, kind: str) -> Tensor:
    """Return the estimate at each token, [T], unreduced; differentiable in `logprobs_T`.

    Args:
        logprobs_T: [T] float, under the policy that sampled the tokens.
        ref_logprobs_T: [T] float, under the reference.
        kind: one of `KL_KINDS`.
    """
    value_T = _ESTIMATORS[kind.removesuffix("+")](logprobs_T, ref_logprobs_T)
    if not kind.endswith("+"):
        return value_T
    surrogate_T = _k2(logprobs_T, ref_logprobs_T)
    return value_T.detach() + (surrogate_T - surrogate_T.detach())
