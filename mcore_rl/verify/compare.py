"""How far what one layout computed is from what one process computed.

Four measures, each the largest over the two updates or over all tensors:

- loss: |a - b| / max(|b|, 1), since a loss is a sum of terms of size 1 that cancel;
- grad norm: |a - b| / |b|;
- weights: largest difference in a tensor / its largest weight;
- updates: largest difference in a tensor / the farthest that one process moved a weight of it.

The last shows a gradient of the wrong size also where weights hardly move. It may be 100 times as
large as the others: a float32 weight of size 1 that moved by 0.01 tells its own movement to 1e-5.

Weights are read one tensor at a time. A number that is not finite departs from everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_rl.models.safetensors_io import CheckpointReader

LOSS, GRAD_NORM = "actor/loss", "actor/grad_norm"
_UPDATE_FACTOR = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The largest relative difference of one measure."""

    measure: str
    where: str
    """The update ("update 2") or the Hugging Face name of the tensor."""
    size: float
    limit: float

    @property
    def departs(self) -> bool:
        return self.size > self.limit

    def __str__(self) -> str:
        return f"{self.measure} by {self.size:.1e} ({self.where})"


def compare_metrics(
    found: Sequence[Mapping[str, float]], expected: Sequence[Mapping[str, float]], tolerance: float
) -> list[Difference]:
    """Return the differences of loss and gradient norm; a skipped update has no norm and departs.

    Args:
        found: metrics of each update in the layout.
        expected: in one process; finite.
        tolerance: relative.
    """
    scales = {
        LOSS: lambda value: max(abs(value), 1.0),
        GRAD_NORM: abs,
    }
    differences = []
    for key, scale in scales.items():
        sizes = [
            _relative(abs(a.get(key, math.nan) - b[key]), scale(b[key]))
            for a, b in zip(found, expected, strict=True)
        ]
        number = sizes.index(max(sizes))
        differences.append(
            Difference(
                measure=key.removeprefix("actor/").replace("_", " "),
                where=f"update {number + 1}",
                size=sizes[number],
                limit=tolerance,
            )
        )
    return differences


def compare_weights(
    found: Path, expected: Path, initial: Path, tolerance: float
) -> list[Difference]:
    """Return the differences of weights and updates, each with its tensor.

    Args:
        found: checkpoint folder after the updates in the layout.
        expected: in one process.
        initial: before.
        tolerance: relative.

    Raises:
        ValueError: if the two do not hold the same tensors.
    """
    ours, theirs, before = (CheckpointReader(folder) for folder in (found, expected, initial))
    strangers = sorted(set(ours.names()) ^ set(theirs.names()))
    if strangers:
        raise ValueError(f"{len(strangers)} tensors are not in both exports, first {strangers[0]}")
    of_weight, of_update = {}, {}
    for name in theirs.names():
        weight = theirs.read(name).float()
        difference = float((ours.read(name).float() - weight).abs().max())
        moved = float((weight - before.read(name).float()).abs().max())
        of_weight[name] = _relative(difference, float(weight.abs().max()))
        of_update[name] = _relative(difference, moved)
    return [
        _largest("weights", of_weight, tolerance),
        _largest("updates", of_update, _UPDATE_FACTOR * tolerance),
    ]


def _largest(measure: str, size_of: Mapping[str, float], limit: float) -> Difference:
    name = max(size_of, key=lambda name: size_of[name])
    return Difference(measure=measure, where=name, size=size_of[name], limit=limit)


def _relative(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    return difference / scale if scale and math.isfinite(difference) else math.inf
