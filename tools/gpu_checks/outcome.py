"""What a check returns: numbers, and how large some of them may be."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number of a row may be at most."""

    name: str
    value: float
    most: float
    reason: str
    """Why not more."""

    @property
    def is_kept(self) -> bool:
        """False for what is not a number, too."""
        return self.value <= self.most


@dataclass(frozen=True, slots=True)
class Outcome:
    """The numbers of a check."""

    values: Values
    bounds: Sequence[Bound] = field(default_factory=tuple)

    @property
    def faults(self) -> list[str]:
        """What is wrong, a line for each bound that is not kept."""
        return [
            f"{bound.name} is {bound.value:.3g}, at most {bound.most:g} allowed: {bound.reason}"
            for bound in self.bounds
            if not bound.is_kept
        ]


class SkippedError(Exception):
    """The check needs what this machine does not have."""


def bounded(errors: Mapping[str, float], most: float, reason: str) -> list[Bound]:
    """Return the same bound of several numbers."""
    return [Bound(name, value, most, reason) for name, value in errors.items()]


def within(errors: Mapping[str, float], most: float, reason: str) -> Outcome:
    """Return the outcome of a check all of whose numbers have the same bound."""
    return Outcome(dict(errors), bounded(errors, most, reason))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def relative_difference(found: float, expected: float) -> float:
    """Return the difference over what is expected, or over 1 where that is smaller."""
    return abs(found - expected) / max(1.0, abs(expected))


def now(device: torch.device) -> float:
    """Return seconds of a clock, all work of the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def free_memory(device: torch.device) -> None:
    """Give back what deleted models held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def free_bytes(device: torch.device) -> int:
    """Return what is free on the device, whoever holds the rest; 0 on CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(device)[0]
