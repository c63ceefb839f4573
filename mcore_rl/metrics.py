"""Metrics that know how they reduce.

A metric is a value with a rule for merging it over micro-batches, ranks and minibatches. The rule
is data and never part of the key. Values stay tensors on their device until `to_floats`, so a step
costs one host copy.

Keys are `section/name[/statistic]`, lower case, with the unit in the name: `actor/pg_loss`,
`time/rollout` (seconds), `mismatch/logprob_abs_diff/max`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_rl.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

Metrics = dict[str, "Metric"]

REDUCTIONS = ("mean", "std", "sum", "share", "max", "min")


@dataclass(frozen=True, slots=True)
class Metric:
    """One number and how it merges with others of the same key.

    For "mean", `value` is the weighted sum and `weight` the total weight (a count of trained
    tokens, of samples, ...), so merging is exact for every split. The same holds for "std", which
    keeps the sum and the deviation: parts with different means have a larger deviation together
    than each alone. A "share" adds up over the micro-batches and ranks of one optimizer update, and
    is averaged over updates (`of_one_update`).
    """

    value: Tensor | float
    reduce: str
    weight: Tensor | float = 1.0
    std: float = 0.0
    """Population standard deviation of what "std" has seen so far."""

    def __post_init__(self) -> None:
        assert self.reduce in REDUCTIONS, self.reduce


def mean(value: Tensor | float, weight: Tensor | float = 1.0) -> Metric:
    """Return a metric that averages: `value` is a mean over `weight` items."""
    return Metric(value * weight, "mean", weight)


def deviation(values: Sequence[float]) -> Metric:
    """Return a metric that is the population standard deviation of all values, however split."""
    std = statistics.pstdev(values) if values else 0.0
    return Metric(math.fsum(values), "std", len(values), std)


def total(value: Tensor | float) -> Metric:
    """Return a metric that adds up."""
    return Metric(value, "sum")


def share(value: Tensor | float) -> Metric:
    """Return a metric that adds up within an update, as the parts of its loss do."""
    return Metric(value, "share")


def maximum(value: Tensor | float) -> Metric:
    return Metric(value, "max")


def minimum(value: Tensor | float) -> Metric:
    return Metric(value, "min")


def masked_mean(values_T: Tensor, mask_T: Tensor) -> Metric:
    """Return the mean of `values_T` [T] over the tokens where `mask_T` [T] bool is True."""
    values_T = values_T.detach().float()
    count = torch.count_nonzero(mask_T).float()  # a sum of booleans is 20 times as slow on CPU
    return Metric(torch.where(mask_T, values_T, 0.0).sum(), "mean", count)


def masked_max(values_T: Tensor, mask_T: Tensor) -> Metric:
    """Return the largest masked value; -inf when the mask is empty, which `merge` ignores."""
    return Metric(_masked_extreme(values_T, mask_T, float("-inf"), torch.max), "max")


def masked_min(values_T: Tensor, mask_T: Tensor) -> Metric:
    """Return the smallest masked value; +inf when the mask is empty, which `merge` ignores."""
    return Metric(_masked_extreme(values_T, mask_T, float("inf"), torch.min), "min")


def masked_sizes(name: str, values_T: Tensor, mask_T: Tensor) -> Metrics:
    """Return `<name>/mean`, `<name>/abs_mean` and `<name>/max` of the masked values: what
    `masked_mean` and `masked_max` give of them and of their sizes, with one copy for all three.

    Args:
        name: section of the keys.
        values_T: [T] float32, on the host.
        mask_T: [T] bool.
    """
    count = torch.count_nonzero(mask_T).float()
    kept_T = torch.where(mask_T, values_T, 0.0)
    total, size = kept_T.sum(), kept_T.abs_().sum()
    nothing = torch.tensor(-math.inf)
    torch.where(mask_T, values_T, nothing, out=kept_T)
    largest = kept_T.max() if len(kept_T) else nothing
    return {
        f"{name}/mean": Metric(total, "mean", count),
        f"{name}/abs_mean": Metric(size, "mean", count),
        f"{name}/max": Metric(largest, "max"),
    }


def _masked_extreme(values_T: Tensor, mask_T: Tensor, empty: float, pick) -> Tensor:
    values_T = torch.where(mask_T, values_T.detach().float(), empty)
    return pick(values_T) if len(values_T) else values_T.new_tensor(empty)


def merge(parts: Iterable[Mapping[str, Metric]]) -> Metrics:
    """Merge the metrics of several micro-batches, ranks or minibatches, key by key."""
    merged: Metrics = {}
    for part in parts:
        for key, metric in part.items():
            merged[key] = _merge_two(key, merged[key], metric) if key in merged else metric
    return merged


def of_one_update(merged: Mapping[str, Metric]) -> Metrics:
    """Return the metrics of all micro-batches and ranks of an update in a form that merges with
    other updates."""
    return {k: mean(m.value) if m.reduce == "share" else m for k, m in merged.items()}


def _merge_two(key: str, a: Metric, b: Metric) -> Metric:
    assert a.reduce == b.reduce, f"{key}: reduced by {a.reduce} and by {b.reduce}"
    if a.reduce in ("mean", "sum", "share"):
        return Metric(a.value + b.value, a.reduce, a.weight + b.weight)
    if a.reduce == "std":
        return Metric(a.value + b.value, "std", a.weight + b.weight, _pooled_std(a, b))
    values = float(a.value), float(b.value)
    # Python's max and min keep or drop a NaN depending on its position.
    pick = max if a.reduce == "max" else min
    return Metric(math.nan if any(map(math.isnan, values)) else pick(values), a.reduce)


def _pooled_std(a: Metric, b: Metric) -> float:
    """Return the deviation of the values of both: the mean of the variances, and the variance of
    the means, weighted (Chan et al. 1979)."""
    of_a, of_b = float(a.weight), float(b.weight)
    if of_a * of_b == 0:
        return a.std + b.std  # one of them has no values
    between = float(a.value) / of_a - float(b.value) / of_b
    within = (of_a * a.std**2 + of_b * b.std**2) / (of_a + of_b)
    return math.sqrt(within + of_a * of_b * (between / (of_a + of_b)) ** 2)


def to_host(metrics: Mapping[str, Metric]) -> Metrics:
    """Return the metrics with every tensor read back to a float, in one copy."""
    tensors = [
        t for m in metrics.values() for t in (m.value, m.weight) if isinstance(t, torch.Tensor)
    ]
    if not tensors:
        return dict(metrics)
    stacked = torch.stack([t.detach().double().reshape(()) for t in tensors]).tolist()
    numbers = iter(stacked)
    read = lambda x: next(numbers) if isinstance(x, torch.Tensor) else float(x)  # noqa: E731
    return {k: Metric(read(m.value), m.reduce, read(m.weight), m.std) for k, m in metrics.items()}


def to_floats(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Return plain numbers; a mean, a deviation and an extreme of nothing are left out."""
    numbers: dict[str, float] = {}
    for key, metric in to_host(metrics).items():
        value, weight = float(metric.value), float(metric.weight)
        if metric.reduce in ("mean", "std"):
            if weight == 0:
                continue
            value = metric.std if metric.reduce == "std" else value / weight
        elif (metric.reduce, value) in (("max", -math.inf), ("min", math.inf)):
            continue
        numbers[key] = value
    return numbers
