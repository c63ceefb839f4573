"""The curves of the report: which metrics share a picture, and their shortened series.

A series of any length becomes at most MOST_POINTS points that keep its spikes: of each stretch of
steps the smallest and the largest value. A running mean over a twentieth of the run goes with it,
computed from all values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from mcore_rl import tolerances
from mcore_rl.observability.alarms import ALARMS
from mcore_rl.observability.columns import Columns, Series, matching

MOST_POINTS = 400
"""Most points of a curve."""
LARGEST = 1e200
"""Larger values count as infinite: a scale from such a value to its double would not be finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One picture of the report."""

    title: str
    caption: str
    """What a reader should know to judge the curve."""
    keys: tuple[str, ...]
    """Patterns of metric keys; the picture needs at least one that was logged."""
    draw: str = "lines"
    """"lines", or "ranges": keys x/min, x/mean, x/max become a band with a line."""
    is_log: bool = False
    """Values on a logarithmic scale."""
    is_share: bool = False
    """From 0 to 1, unless a value lies outside."""
    lines: tuple[tuple[float, str], ...] = ()
    """Horizontal lines, each (value, label)."""


PLOTS = (
    Plot(title="Reward", caption="Mean over the samples of a step.", keys=("reward/mean",)),
    Plot(
        title="Validation accuracy",
        caption="Mean score of the held-out prompts.",
        keys=("eval/*/accuracy",),
        is_share=True,
    ),
    Plot(
        title="Response length (tokens)",
        caption="Mean over the samples of a step, between the shortest and the longest.",
        keys=("rollout/response_tokens/*",),
        draw="ranges",
    ),
    Plot(
        title="Importance ratio",
        caption="New over old probability, per token (ratio) and per sequence (seq_ratio): mean "
        "between the smallest and the largest of a step.",
        keys=("actor/ratio/*", "actor/seq_ratio/*"),
        draw="ranges",
        is_log=True,
        lines=((1.0, ""),),
    ),
    Plot(
        title="Trainer against engine: |logprob difference|",
        caption="Over the sampled tokens. The dashed line is what float32 stays below; bfloat16 "
        "lies above it.",
        keys=("mismatch/logprob_abs_diff/max", "mismatch/logprob_abs_diff/mean"),
        is_log=True,
        lines=((tolerances.FLOAT32, f"float32 {tolerances.FLOAT32:g}"),),
    ),
    Plot(title="Gradient norm", caption="Before clipping.", keys=("actor/grad_norm",)),
    Plot(
        title="Loss",
        caption="Policy loss and, where used, the KL term. A policy loss says little by itself: "
        "its mean is near 0 whether or not the policy improves.",
        keys=("sft/loss", "actor/pg_loss", "actor/kl_loss"),
    ),
    Plot(
        title="Entropy (nats per token)",
        caption="A fall to 0 means that the policy no longer explores.",
        keys=("actor/entropy",),
    ),
    Plot(
        title="Groups that teach nothing",
        caption="Share of groups whose samples all have the same reward.",
        keys=("reward/zero_std_group_frac",),
        is_share=True,
    ),
    Plot(
        title="Cut off or failed",
        caption="Shares of responses: cut off at the length limit, failed in the engine, failed in "
        "the reward.",
        keys=("rollout/truncated_frac", "rollout/failed_frac", "reward/failed_frac"),
        is_share=True,
    ),
    Plot(
        title="Staleness (steps)",
        caption="By how many steps the weights that drew a sample are older than those that train "
        "on it.",
        keys=("rollout/staleness/max", "rollout/staleness/mean"),
    ),
    Plot(
        title="Who works",
        caption="Share of a step in which engines had requests, and in which the trainer computed. "
        "Both near 1: they overlap. One near 1 and the other not: the other waits for it.",
        keys=("perf/engines_busy_frac", "perf/trainer_busy_frac"),
        is_share=True,
    ),
    Plot(
        title="Throughput (tokens per second)",
        caption="Over the whole step.",
        keys=("perf/tokens_per_s",),
    ),
)


def plots_of(runs: Sequence[Columns]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the plots for which a run has a metric, and those for which none has.

    A plot is its fields, with the keys that were logged in place of the patterns, and in `alarms`
    the titles of the alarms that watch one of them.
    """
    drawn, missing = [], []
    for plot in PLOTS:
        keys = list(dict.fromkeys(key for run in runs for key in matching(run, plot.keys)))
        alarms = [alarm.title for alarm in ALARMS if alarm.key in keys]
        entry = {**asdict(plot), "keys": keys or list(plot.keys), "alarms": alarms}
        (drawn if keys else missing).append(entry)
    return drawn, missing


def curve(series: Series) -> dict[str, Any]:
    """Return a series as the page draws it; values that are not finite are None."""
    short = thinned(series)
    return {
        "steps": short.steps,
        "values": [_drawn(value) for value in short.values],
        "smooth": None if (mean := running_mean(series)) is None else mean._asdict(),
    }


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """Return at most `most` points of a series: its ends, and the smallest and the largest value of
    each stretch of steps between them."""
    steps, values = series
    if len(steps) <= most:
        return series
    num_parts, positions = most // 2 - 1, {0, len(steps) - 1}
    for part in range(num_parts):
        begin, end = (len(steps) * i // num_parts for i in (part, part + 1))
        finite = [i for i in range(begin, end) if math.isfinite(values[i])] or [begin]
        positions |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    chosen = sorted(positions)
    return Series([steps[i] for i in chosen], [values[i] for i in chosen])


def running_mean(series: Series, min_length: int = 60, most: int = 200) -> Series | None:
    """Return the mean over a twentieth of the run around each of at most `most` steps; None for a
    short run, or where a value is not finite."""
    steps, values = series
    if len(steps) < min_length or any(_drawn(value) is None for value in values):
        return None
    sums = [0.0, *accumulate(values)]
    reach, num = len(steps) // 40, min(len(steps), most)
    chosen = [i * (len(steps) - 1) // (num - 1) for i in range(num)]
    ends = [(max(0, i - reach), min(len(steps), i + reach + 1)) for i in chosen]
    means = [rounded((sums[end] - sums[begin]) / (end - begin)) for begin, end in ends]
    return Series([steps[i] for i in chosen], means)


def rounded(value: float) -> float:
    """Return five significant digits of a value."""
    return float(f"{value:.5g}")


def _drawn(value: float) -> float | None:
    return rounded(value) if abs(value) < LARGEST else None  # false for a NaN too
