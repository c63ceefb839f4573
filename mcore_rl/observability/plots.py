"""The curves of the report: one PNG per entry of PLOTS, from the columns of `metrics.jsonl`.

Uses matplotlib without pyplot, so nothing global changes and no display is needed. The same
numbers give the same bytes. Knows nothing about files or HTML.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from mcore_rl import tolerances
from mcore_rl.printable import printable

COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777")
GREY = "#94a3b8"
_LARGEST = 1e200
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": "#475569",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.7,
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}


class Series(NamedTuple):
    """One metric over the steps that logged it."""

    steps: list[int]
    values: list[float]


Columns = Mapping[str, Series]


def to_columns(records: Iterable[Mapping[str, Any]]) -> Columns:
    """Turn records {"step": 0, "reward/mean": 0.5} into a series per metric."""
    columns: dict[str, Series] = {}
    for record in records:
        for key, value in record.items():
            if key != "step":
                series = columns.setdefault(key, Series([], []))
                series.steps.append(record["step"])
                series.values.append(value)
    return columns


def matching(columns: Columns, patterns: Sequence[str]) -> list[str]:
    """Return the keys that match a pattern, in the order of the patterns, then by name."""
    return [key for pattern in patterns for key in sorted(columns) if fnmatchcase(key, pattern)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One picture of the report."""

    name: str
    """File stem."""
    title: str
    caption: str
    """What a reader should know to judge the curve."""
    keys: tuple[str, ...]
    """Patterns of metric keys; the picture needs at least one that was logged."""
    draw: Callable[[Axes, Columns, Sequence[str]], None]
    """Draws on the axes, given all columns and the keys that matched."""

    def to_png(self, columns: Columns) -> bytes:
        """Return the picture; the caller has checked that a key matches."""
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(6.4, 3.3), layout="constrained")
            axes = figure.subplots()
            keys = matching(columns, self.keys)
            columns = {key: _drawable(columns[key]) for key in columns}
            self.draw(axes, columns, keys)
            axes.set_title(self.title)
            axes.set_xlabel("step")
            steps = [step for key in keys for step in columns[key].steps]
            axes.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
            axes.xaxis.set_major_locator(
                MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
            )
            if axes.get_legend() is None and len(axes.get_legend_handles_labels()[1]) > 1:
                axes.legend(loc="best")
            png = io.BytesIO()
            figure.savefig(png, dpi=150)
        return png.getvalue()


def _drawable(series: Series) -> Series:
    """Return what matplotlib can place: it leaves infinity out, and fails near 1e308."""
    values = [math.copysign(math.inf, v) if abs(v) > _LARGEST else v for v in series.values]
    return Series(series.steps, values)


def draw_lines(axes: Axes, columns: Columns, keys: Sequence[str]) -> None:
    """Draw each key as a line; a long noisy one pale, with its running mean on top."""
    for key, color in zip(keys, cycle(COLORS)):
        steps, values = columns[key]
        label = _label(key.partition("/")[2])
        smooth = _running_mean(values)
        if smooth is None:
            axes.plot(steps, values, color=color, label=label, marker=_marker(steps), markersize=3)
        else:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            axes.plot(steps, smooth, color=color, label=label)


def _label(name: str) -> str:
    """Return a name as it is to be drawn: a dollar sign begins no formula."""
    return printable(name).replace("$", r"\$")


def _marker(steps: Sequence[int]) -> str:
    """Return dots for a short run, whose line may have a single point."""
    return "o" if len(steps) <= 40 else ""


def _running_mean(values: Sequence[float], min_length: int = 60) -> list[float] | None:
    """Return the mean over a twentieth of the run around each step; None for a short run."""
    if len(values) < min_length:
        return None
    reach = len(values) // 40
    around = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [math.fsum(part) / len(part) for part in around]


def draw_accuracy(axes: Axes, columns: Columns, keys: Sequence[str]) -> None:
    """Draw one marked line per validation set; from 0 to 1 unless a score lies outside."""
    for key, color in zip(keys, cycle(COLORS)):
        steps, values = columns[key]
        label = _label(key.split("/")[1])
        axes.plot(steps, values, color=color, label=label, marker="o", markersize=4)
        axes.annotate(
            f"{values[-1]:.3f}",
            (steps[-1], values[-1]),
            xytext=(-4, -12 if values[-1] > 0.9 else 6),
            textcoords="offset points",
            ha="right",
            color=color,
            weight="bold",
        )
    if all(0 <= value <= 1 for key in keys for value in columns[key].values):
        axes.set_ylim(-0.02, 1.02)
    else:
        axes.margins(y=0.1)  # room for the labels


def draw_ranges(axes: Axes, columns: Columns, keys: Sequence[str]) -> None:
    """Draw, for keys x/min, x/mean, x/max, the range as a band with the mean as a line."""
    names = dict.fromkeys(key.rpartition("/")[0] for key in keys)
    for name, color in zip(names, cycle(COLORS)):
        lows, highs = columns.get(f"{name}/min"), columns.get(f"{name}/max")
        label = _label(name.partition("/")[2])
        if lows and highs and lows.steps == highs.steps:
            axes.fill_between(*lows, highs.values, color=color, alpha=0.15, linewidth=0)
        for series in (lows, highs):
            if series:
                style = {"linewidth": 0.8, "alpha": 0.7, "markersize": 2}
                axes.plot(*series, color=color, marker=_marker(series.steps), **style)
        if f"{name}/mean" in columns:
            means = columns[f"{name}/mean"]
            axes.plot(*means, color=color, label=label, marker=_marker(means.steps), markersize=3)
        else:
            axes.plot([], [], color=color, label=label)


def draw_ratios(axes: Axes, columns: Columns, keys: Sequence[str]) -> None:
    """Draw the ranges of the importance ratios around 1; on a log scale once they are wide."""
    axes.axhline(1, color=GREY, linewidth=1, linestyle=":")
    draw_ranges(axes, columns, keys)
    values = [value for key in keys for value in columns[key].values]
    if min(values) > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())


def draw_mismatch(axes: Axes, columns: Columns, keys: Sequence[str]) -> None:
    """Draw the logprob differences on a log scale below the line that float32 stays under."""
    draw_lines(axes, columns, keys)
    axes.axhline(
        tolerances.FLOAT32,
        color=COLORS[4],
        linewidth=1.2,
        linestyle="--",
        label=f"float32 tolerance {tolerances.FLOAT32:g}",
    )
    axes.set_yscale("log", nonpositive="mask")
    shown = [
        tolerances.FLOAT32,
        *(v for key in keys for v in columns[key].values if 0 < v < math.inf),
    ]
    axes.set_ylim(0.3 * min(shown), 30 * max(shown))
    axes.legend(loc="upper right", ncols=3)


STAGE_ORDER = ("rollout", "reward", "old_logprobs", "ref_logprobs", "train", "weight_sync")


def draw_times(axes: Axes, columns: Columns, keys: Sequence[str]) -> None:
    """Stack the seconds of the stages of each step; what no stage covers is "other"."""
    steps = sorted({step for key in keys for step in columns[key].steps})
    seconds: dict[str, list[float]] = {}
    for key in sorted(keys, key=lambda key: (_stage_rank(key), key)):
        logged = dict(zip(*columns[key], strict=True))
        seconds[key.partition("/")[2]] = [logged.get(step, 0.0) for step in steps]
    if whole := seconds.pop("step", None):
        covered = [math.fsum(stages) for stages in zip(*seconds.values(), strict=True)]
        pairs = zip(whole, covered or [0.0] * len(whole), strict=True)
        seconds["other"] = [max(0.0, all_s - covered_s) for all_s, covered_s in pairs]
    # each step is a column from step - 0.5 to step + 0.5
    edges = [edge for step in steps for edge in (step - 0.5, step + 0.5)]
    columns_s = [[value for value in values for _ in range(2)] for values in seconds.values()]
    colors = [GREY if stage == "other" else color for stage, color in zip(seconds, cycle(COLORS))]
    axes.stackplot(
        edges, columns_s, labels=[*map(_label, seconds)], colors=colors, alpha=0.85, linewidth=0
    )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("seconds")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1, 0.5))


def _stage_rank(key: str) -> int:
    stage = key.partition("/")[2]
    return STAGE_ORDER.index(stage) if stage in STAGE_ORDER else len(STAGE_ORDER)


PLOTS = (
    Plot(
        name="reward",
        title="Reward",
        caption="Mean over the samples of a step.",
        keys=("reward/mean",),
        draw=draw_lines,
    ),
    Plot(
        name="accuracy",
        title="Validation accuracy",
        caption="Mean score of the held-out prompts.",
        keys=("eval/*/accuracy",),
        draw=draw_accuracy,
    ),
    Plot(
        name="response_tokens",
        title="Response length (tokens)",
        caption="Mean over the samples of a step, between the shortest and the longest.",
        keys=("rollout/response_tokens/*",),
        draw=draw_ranges,
    ),
    Plot(
        name="importance_ratio",
        title="Importance ratio",
        caption="New over old probability, per token (ratio) and per sequence (seq_ratio): mean "
        "between the smallest and the largest of a step.",
        keys=("actor/ratio/*", "actor/seq_ratio/*"),
        draw=draw_ratios,
    ),
    Plot(
        name="mismatch",
        title="Trainer against engine: |logprob difference|",
        caption="Over the sampled tokens. The dashed line is what float32 stays below; bfloat16 "
        "lies above it.",
        keys=("mismatch/logprob_abs_diff/max", "mismatch/logprob_abs_diff/mean"),
        draw=draw_mismatch,
    ),
    Plot(
        name="grad_norm",
        title="Gradient norm",
        caption="Before clipping.",
        keys=("actor/grad_norm",),
        draw=draw_lines,
    ),
    Plot(
        name="loss",
        title="Loss",
        caption="Policy loss and, where used, the KL term. A policy loss says little by itself: "
        "its mean is near 0 whether or not the policy improves.",
        keys=("sft/loss", "actor/pg_loss", "actor/kl_loss"),
        draw=draw_lines,
    ),
    Plot(
        name="entropy",
        title="Entropy (nats per token)",
        caption="A fall to 0 means that the policy no longer explores.",
        keys=("actor/entropy",),
        draw=draw_lines,
    ),
    Plot(
        name="time",
        title="Time per step",
        caption="Wall time of each stage, stacked.",
        keys=("time/*",),
        draw=draw_times,
    ),
    Plot(
        name="busy",
        title="Who works",
        caption="Share of a step in which engines had requests, and in which the trainer computed. "
        "Both near 1: they overlap. One near 1 and the other not: the other waits for it.",
        keys=("perf/engines_busy_frac", "perf/trainer_busy_frac"),
        draw=draw_lines,
    ),
    Plot(
        name="throughput",
        title="Throughput (tokens per second)",
        caption="Over the whole step.",
        keys=("perf/tokens_per_s",),
        draw=draw_lines,
    ),
)
