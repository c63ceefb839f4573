"""DAPO's soft overlong penalty, added to the score of a response.

    r += min(-(length - (max_length - len)) / len * penalty_factor, 0)

Nothing up to max_length - len tokens, then linearly down to -penalty_factor at the limit.

Source: DAPO, arXiv:2503.14476, eq. 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mcore_rl.metrics import Metrics, mean, merge
from mcore_rl.rewards.base import OverlongBufferConfig
from mcore_rl.types import Sample, SampleGroup


def penalize_overlong(
    groups: Sequence[SampleGroup], cfg: OverlongBufferConfig, max_response_length: int
) -> tuple[list[SampleGroup], Metrics]:
    """Return copies with the penalty in `reward` and the score in `reward_metrics["score"]`.

    Args:
        groups: scored.
        cfg: enabled.
        max_response_length: tokens, the end token included.

    Returns:
        The groups, and `reward/overlong_penalty`, `reward/overlong_frac` over samples.
    """
    free = max_response_length - cfg.len

    def penalty(sample: Sample) -> float:
        return min(-(sample.num_response_tokens - free) / cfg.len * cfg.penalty_factor, 0.0)

    def penalized(sample: Sample) -> Sample:
        return replace(
            sample,
            reward=sample.reward + penalty(sample),
            reward_metrics={**sample.reward_metrics, "score": sample.reward},
        )

    metrics = merge(
        {
            "reward/overlong_penalty": mean(penalty(sample)),
            "reward/overlong_frac": mean(float(penalty(sample) < 0)),
        }
        for group in groups
        for sample in group.samples
    )
    return [replace(g, samples=[penalized(s) for s in g.samples]) for g in groups], metrics
