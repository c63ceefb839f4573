"""What the report shows of one run, read from its folder. The same files give the same data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mcore_rl import tolerances
from mcore_rl.errors import UserError
from mcore_rl.foreign_json import parse_json
from mcore_rl.observability.alarms import ALARMS, Alarm
from mcore_rl.observability.columns import Columns, Series, matching, to_columns
from mcore_rl.observability.jsonl import read_metrics
from mcore_rl.observability.report.curves import curve
from mcore_rl.observability.report.excerpt import excerpt
from mcore_rl.observability.report.timeline import MOST_STEPS, stretches, timeline
from mcore_rl.observability.run_folder import (
    CONFIG_FILE,
    MEMORY_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    read_config,
    value_of,
)
from mcore_rl.observability.timers import format_duration

SUMMARY = {
    "reward/mean": max,
    "eval/*/accuracy": max,
    "eval/*/response_tokens/mean": None,
    "rollout/response_tokens/mean": None,
    "rollout/truncated_frac": min,
    "mismatch/logprob_abs_diff/max": min,
    "mismatch/logprob_abs_diff/mean": min,
    "sft/loss": min,
    "actor/pg_loss": None,
    "actor/kl_loss": None,
    "actor/entropy": None,
    "actor/grad_norm": None,
    "actor/clip_frac": None,
    "time/step": min,
    "perf/tokens_per_s": max,
    "perf/memory_peak_gib": None,
}
"""Metrics of the table of numbers; which of their values is the best, None where none is."""

TRAINING_KEYS = ("reward/mean", "sft/loss")
"""Metrics of which every step that trains logs one, and a validation alone none."""

CONFIG_KEYS = (
    "model.path",
    "algorithm.adv_estimator",
    "actor.policy_loss.loss_mode",
    "actor.clip_ratio_low",
    "actor.clip_ratio_high",
    "actor.loss_agg_mode",
    "actor.optim.lr",
    "actor.use_kl_loss",
    "actor.ppo_epochs",
    "actor.ppo_mini_batch_size",
    "actor.megatron.tensor_model_parallel_size",
    "actor.megatron.pipeline_model_parallel_size",
    "actor.megatron.context_parallel_size",
    "actor.megatron.expert_model_parallel_size",
    "rollout.name",
    "rollout.n",
    "rollout.temperature",
    "data.train_files",
    "data.train_batch_size",
    "data.max_response_length",
    "trainer.loop",
    "trainer.max_staleness",
    "trainer.total_training_steps",
)
"""Settings shown above the whole configuration, where the run has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    """One metric over the run, exactly as logged."""

    key: str
    first: float
    last: float
    best: float | None
    """None where neither high nor low is better."""
    best_step: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFolder:
    """The present content of a run folder."""

    path: Path
    columns: Columns
    config: dict[str, Any]
    """{} where there is none."""

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read a folder.

        Raises:
            UserError: if it has no step in its metrics file and no samples, or a line that is not
                JSON.
        """
        metrics_file, config_file = path / METRICS_FILE, path / CONFIG_FILE
        records = read_metrics(metrics_file) if metrics_file.exists() else []
        if not records and not (path / SAMPLES_FILE).exists():
            raise UserError(
                f"{metrics_file}: there is no logged step. Give the folder of a run that has done "
                "one."
            )
        config = read_config(config_file) if config_file.exists() else {}
        return cls(path=path, columns=to_columns(records), config=config)


def titles(runs: Sequence[RunFolder]) -> list[str]:
    """Return the name of each run, with that of its folder where two have the same."""
    folders = [run.path.resolve().name for run in runs]
    names = [
        str(value_of(run.config, "trainer.experiment_name") or folder)
        for run, folder in zip(runs, folders, strict=True)
    ]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]


def run_data(folder: RunFolder, title: str, share: float) -> dict[str, Any]:
    """Return what the page shows of a run.

    Args:
        folder: of the run.
        title: of the run.
        share: of the page's bytes for samples.
    """
    columns, rows = folder.columns, timeline(folder.columns)
    return {
        "title": title,
        "cards": cards(columns),
        "columns": {key: curve(columns[key]) for key in sorted(columns)},
        "alarms": [_fired(columns, alarm) for alarm in ALARMS],
        "timeline": {"rows": rows[-MOST_STEPS:], "stretches": stretches(rows)},
        "samples": excerpt(folder.path / SAMPLES_FILE, share),
        "summary": [_shown_row(row) for row in summarize(columns)],
        "memory": _memory(folder.path / MEMORY_FILE),
        "config": _config(folder.config),
    }


def summarize(columns: Columns) -> list[SummaryRow]:
    """Return the rows of the table of numbers for the metrics that were logged."""
    timed = training_times(columns)
    rows = []
    for pattern, pick in SUMMARY.items():
        for key in matching(columns, [pattern]):
            steps, values = timed if key == "time/step" else columns[key]
            if not steps:
                continue
            finite = [value for value in values if math.isfinite(value)]
            best = pick(finite) if pick and finite else None
            rows.append(
                SummaryRow(
                    key=key,
                    first=values[0],
                    last=values[-1],
                    best=best,
                    best_step=None if best is None else steps[values.index(best)],
                )
            )
    return rows


def training_times(columns: Columns) -> Series:
    """Return `time/step` of the steps that trained: the last line may be a validation alone."""
    trained = {step for key in TRAINING_KEYS if key in columns for step in columns[key].steps}
    steps, seconds = columns.get("time/step", ([], []))
    of_trained_steps = [pair for pair in zip(steps, seconds, strict=True) if pair[0] in trained]
    return Series([step for step, _ in of_trained_steps], [value for _, value in of_trained_steps])


def cards(columns: Columns) -> list[dict[str, str]]:
    """Return the few numbers at the top of the page, each with a name and a note."""
    found = []
    for key in matching(columns, ["reward/mean", "eval/*/accuracy"]):
        values = columns[key].values
        found.append((key, f"{values[-1]:.3f}", f"from {values[0]:.3f}"))
    if mismatch := columns.get("mismatch/logprob_abs_diff/max"):
        note = f"float32 tolerance {tolerances.FLOAT32:g}"
        found.append(("largest logprob mismatch", f"{max(mismatch.values):.1e}", note))
    total_s = sum(columns.get("time/step", Series([], [])).values)
    if (step_s := training_times(columns).values) and math.isfinite(total_s):
        note = f"{len(step_s)} steps of {sum(step_s) / len(step_s):.1f} s"
        found.append(("time", format_duration(total_s), note))
    return [{"name": name, "value": value, "note": note} for name, value, note in found]


def differences(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Return [key, value in each run] of each setting in which the runs differ."""
    settings = [dict(_leaves(run.config)) for run in runs]
    keys = dict.fromkeys(key for of_run in settings for key in of_run)
    rows = [[key, *(of_run.get(key, "-") for of_run in settings)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, str(node)


def _fired(columns: Columns, alarm: Alarm) -> dict[str, Any]:
    """Return the steps where an alarm fired, as the first and the last of each run of logged steps,
    None where the metric was not logged; and the metric's value at the first of them."""
    steps = alarm.fired(columns)
    if not steps:
        return {"ranges": steps, "num_steps": 0, "value": None}
    logged, values = columns[alarm.key]
    place = {step: i for i, step in enumerate(logged)}
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and place[step] == place[ranges[-1][1]] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    value = f"{values[place[steps[0]]]:.4g}"
    return {"ranges": ranges, "num_steps": len(steps), "value": value}


def _shown_row(row: SummaryRow) -> dict[str, str]:
    return {
        "key": row.key,
        "first": f"{row.first:.6g}",
        "last": f"{row.last:.6g}",
        "best": "" if row.best is None else f"{row.best:.6g}",
        "best_step": "" if row.best_step is None else str(row.best_step),
    }


def _memory(path: Path) -> dict[str, Any] | None:
    """Return the workers' memory next to the plan's estimate; None if the run has not written
    it."""
    try:
        record = parse_json(path.read_bytes())
        what = str(record["what"])
        rows = [
            (str(row["phase"]), float(row["estimated_gib"]), float(row["measured_gib"]))
            for row in record["rows"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    cells = [
        [phase, f"{estimated:.2f}", f"{measured:.2f}", f"{estimated / measured:.3f}"]
        for phase, estimated, measured in rows
        if measured
    ]
    return {"what": what, "rows": cells}


def _config(config: dict[str, Any]) -> dict[str, Any] | None:
    if not config:
        return None
    values = ((key, value_of(config, key)) for key in CONFIG_KEYS)
    return {
        "rows": [[key, str(value)] for key, value in values if value is not None],
        "text": OmegaConf.to_yaml(OmegaConf.create(config)),
    }
