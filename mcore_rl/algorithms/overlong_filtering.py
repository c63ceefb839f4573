"""DAPO's overlong filtering: a response that was cut off at the limit does not train.

It still counts in the statistics of its group. Source: DAPO, arXiv:2503.14476, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mcore_rl.types import NUMBERS, Sample, SampleGroup


def without_truncated(groups: Sequence[SampleGroup]) -> list[SampleGroup]:
    """Return copies of the groups in which no token of a truncated sample trains."""
    return [replace(g, samples=[_untrained_if_truncated(s) for s in g.samples]) for g in groups]


def _untrained_if_truncated(sample: Sample) -> Sample:
    if sample.finish_reason != "length":
        return sample
    numbers = {name: getattr(sample, name) for name in NUMBERS}
    zeros = {name: np.zeros_like(x) for name, x in numbers.items() if x is not None}
    return replace(sample, loss_mask=np.zeros_like(sample.loss_mask), **zeros)
