"""DAPO's overlong filtering: a response that was cut off at the limit does not train.

It still counts in the statistics of its group. Source: DAPO, arXiv:2503.14476, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mcore_rl.types import Sample, SampleGroup

_PER_TOKEN = ("rollout_logprobs", "old_logprobs", "ref_logprobs")


def without_truncated(groups: Sequence[SampleGroup]) -> list[SampleGroup]:
    """Return copies of the groups in which no token of a truncated sample trains."""
    return [replace(g, samples=[_untrained_if_truncated(s) for s in g.samples]) for g in groups]


def _untrained_if_truncated(sample: Sample) -> Sample:
    if sample.finish_reason != "length":
        return sample
    zeros = {name: [0.0] * len(getattr(sample, name)) for name in _PER_TOKEN}
    return replace(sample, loss_mask=[False] * len(sample.loss_mask), **zeros)
