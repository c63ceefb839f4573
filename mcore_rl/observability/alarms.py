"""Seven signs that a run goes wrong: each a metric, a threshold, and the steps where it is crossed.

An alarm says where to look, not what is wrong: `docs/alarms.md` has a section for each. A rule is a
function of one series; it sees the logged steps in order and nothing of the future.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_rl import tolerances
from mcore_rl.observability.columns import Columns, Series

EXPLANATIONS = Path(__file__).with_name("alarms.md")
"""The page that explains them, a section each; the docs show it as `docs/alarms.md`."""

TREND_WINDOW, TREND_FACTOR = 10, 3.0
ENTROPY_WINDOW, ENTROPY_FRAC = 5, 0.05
NORM_WINDOW, NORM_FACTOR = 20, 10.0
GROUPS_WINDOW, GROUPS_FRAC = 5, 0.9
TRUNCATED_WINDOW, TRUNCATED_FRAC = 5, 0.25
LENGTH_WINDOW, LENGTH_STEPS, LENGTH_FACTOR = 5, 20, 2.0
FAILED_FRAC = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A sign that a run goes wrong."""

    title: str
    """Title of its section on the page that explains it."""
    key: str
    """Metric that it watches."""
    threshold: str
    """When it fires, in words."""
    rule: Callable[[Series], list[int]]
    """Returns the steps where it fires."""

    @property
    def anchor(self) -> str:
        """Anchor of its section, in the Markdown form: "mismatch-trend"."""
        return self.title.lower().replace(" ", "-")

    def fired(self, columns: Columns) -> list[int] | None:
        """Return the steps where it fires; None where the run has not logged the metric."""
        return self.rule(columns[self.key]) if self.key in columns else None


def mismatch_trend(series: Series) -> list[int]:
    """Return the steps where the mean of the last steps is far above that of the first ones, and
    above what float32 explains."""
    begin = _mean(series.values[:TREND_WINDOW])
    limit = max(TREND_FACTOR * begin, tolerances.FLOAT32)
    return [
        step
        for step, mean in _running_means(series, TREND_WINDOW)
        if mean > limit or not math.isfinite(mean)
    ]


def entropy_collapse(series: Series) -> list[int]:
    """Return the steps where little of the entropy of the first steps is left."""
    begin = _mean(series.values[:ENTROPY_WINDOW])
    means = _running_means(series, ENTROPY_WINDOW)
    return [step for step, mean in means if not mean >= ENTROPY_FRAC * begin]


def gradient_norm(series: Series) -> list[int]:
    """Return the steps whose norm is not finite, or far above the median of those before."""
    steps = []
    before: list[float] = []
    for step, value in zip(*series, strict=True):
        recent = before[-NORM_WINDOW:]
        is_high = len(recent) == NORM_WINDOW and value > NORM_FACTOR * statistics.median(recent)
        if is_high or not math.isfinite(value):
            steps.append(step)
        if math.isfinite(value):
            before.append(value)
    return steps


def zero_variance_groups(series: Series) -> list[int]:
    """Return the steps where in recent steps almost no group had samples of different rewards."""
    means = _running_means(series, GROUPS_WINDOW)
    return [step for step, mean in means if mean > GROUPS_FRAC]


def truncation(series: Series) -> list[int]:
    """Return the steps where in recent steps many responses were cut off at the limit."""
    means = _running_means(series, TRUNCATED_WINDOW)
    return [step for step, mean in means if mean > TRUNCATED_FRAC]


def response_length(series: Series) -> list[int]:
    """Return the steps where the length has changed by a factor within few steps."""
    means = list(_running_means(series, LENGTH_WINDOW))
    steps = []
    for i, (step, mean) in enumerate(means):
        before = means[max(0, i - LENGTH_STEPS)][1]
        if mean > LENGTH_FACTOR * before or mean * LENGTH_FACTOR < before:
            steps.append(step)
    return steps


def failed_rewards(series: Series) -> list[int]:
    """Return the steps where more than a few rewards failed."""
    return [step for step, value in zip(*series, strict=True) if value > FAILED_FRAC]


ALARMS = (
    Alarm(
        title="Mismatch trend",
        key="mismatch/logprob_abs_diff/mean",
        threshold=f"mean of {TREND_WINDOW} steps above {TREND_FACTOR:g} times that of the first "
        f"{TREND_WINDOW}, and above {tolerances.FLOAT32:g}",
        rule=mismatch_trend,
    ),
    Alarm(
        title="Entropy collapse",
        key="actor/entropy",
        threshold=f"mean of {ENTROPY_WINDOW} steps below {ENTROPY_FRAC:.0%} of that of the first "
        f"{ENTROPY_WINDOW}",
        rule=entropy_collapse,
    ),
    Alarm(
        title="Gradient norm",
        key="actor/grad_norm",
        threshold=f"above {NORM_FACTOR:g} times the median of the {NORM_WINDOW} steps before, or "
        "not finite",
        rule=gradient_norm,
    ),
    Alarm(
        title="Zero-variance groups",
        key="reward/zero_std_group_frac",
        threshold=f"mean of {GROUPS_WINDOW} steps above {GROUPS_FRAC:.0%} of the groups",
        rule=zero_variance_groups,
    ),
    Alarm(
        title="Truncation",
        key="rollout/truncated_frac",
        threshold=f"mean of {TRUNCATED_WINDOW} steps above {TRUNCATED_FRAC:.0%} of the responses",
        rule=truncation,
    ),
    Alarm(
        title="Response length",
        key="rollout/response_tokens/mean",
        threshold=f"mean of {LENGTH_WINDOW} steps {LENGTH_FACTOR:g} times as long or as short as "
        f"{LENGTH_STEPS} steps before",
        rule=response_length,
    ),
    Alarm(
        title="Failed rewards",
        key="reward/failed_frac",
        threshold=f"above {FAILED_FRAC:.0%} of the responses",
        rule=failed_rewards,
    ),
)


def explanations() -> dict[str, str]:
    """Return the section of each alarm by its title, as Markdown."""
    parts = re.split(r"^## (.+)$", EXPLANATIONS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {title: text.strip() for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _running_means(series: Series, window: int) -> list[tuple[int, float]]:
    """Return (step, mean of the last `window` values) of each step that has so many."""
    steps, values = series
    ends = range(window, len(steps) + 1)
    return [(steps[end - 1], _mean(values[end - window : end])) for end in ends]
