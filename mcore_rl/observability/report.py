"""The report of a run: one HTML page that needs nothing beside it.

Reads `config.yaml`, `metrics.jsonl`, `samples.jsonl` and `memory.json` of a run folder and writes
`report.html` and `plots/*.png` there. The same files give the same page. A part whose data is
missing is left out, and but for the memory named on the page; only `metrics.jsonl` is required.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mcore_rl import tolerances
from mcore_rl.durable_files import write_whole
from mcore_rl.errors import UserError
from mcore_rl.foreign_json import parse_json
from mcore_rl.observability.jsonl import read_metrics, read_records
from mcore_rl.observability.plots import (
    PLOTS,
    Columns,
    Series,
    matching,
    to_columns,
)
from mcore_rl.observability.run_folder import (
    CONFIG_FILE,
    MEMORY_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SAMPLES_FILE,
    read_config,
    value_of,
)
from mcore_rl.observability.timers import format_duration
from mcore_rl.printable import printable

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
"""Metrics of the summary table; which of their values is the best, None where none is."""

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


def write_report(run_dir: Path) -> Path:
    """Write `report.html` and `plots/` into the run folder and return the page's path.

    Raises:
        UserError: if the folder has no step in its metrics file, or a line that is not JSON.
    """
    metrics_path = run_dir / METRICS_FILE
    records = read_metrics(metrics_path) if metrics_path.exists() else []
    if not records:
        raise UserError(
            f"{metrics_path}: there is no logged step. Give the folder of a run that has done one."
        )
    columns = to_columns(records)
    config_file = run_dir / CONFIG_FILE
    config = read_config(config_file) if config_file.exists() else {}
    pngs = {plot.name: plot.to_png(columns) for plot in PLOTS if matching(columns, plot.keys)}
    (run_dir / "plots").mkdir(exist_ok=True)
    for name, png in pngs.items():
        write_whole(run_dir / "plots" / f"{name}.png", png)
    title = value_of(config, "trainer.experiment_name") or run_dir.resolve().name
    page = _PAGE.format(
        title=escape(str(title)),
        cards=_cards(columns),
        plots=_plots(pngs),
        summary=_summary_table(summarize(columns)),
        memory=_memory(run_dir / MEMORY_FILE),
        samples=_samples(run_dir / SAMPLES_FILE),
        config=_config(config),
    )
    path = run_dir / REPORT_FILE
    write_whole(path, printable(page))
    return path


def summarize(columns: Columns) -> list[SummaryRow]:
    """Return the rows of the summary table for the metrics that were logged."""
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
    kept = [pair for pair in zip(steps, seconds, strict=True) if pair[0] in trained]
    return Series([step for step, _ in kept], [value for _, value in kept])


def _cards(columns: Columns) -> str:
    cards = []
    for key in matching(columns, ["reward/mean", "eval/*/accuracy"]):
        values = columns[key].values
        cards.append((key, f"{values[-1]:.3f}", f"from {values[0]:.3f}"))
    if mismatch := columns.get("mismatch/logprob_abs_diff/max"):
        note = f"float32 tolerance {tolerances.FLOAT32:g}"
        cards.append(("largest logprob mismatch", f"{max(mismatch.values):.1e}", note))
    if step_s := training_times(columns).values:
        note = f"{len(step_s)} steps of {sum(step_s) / len(step_s):.1f} s"
        cards.append(("time", format_duration(sum(columns["time/step"].values)), note))
    return "".join(
        f'<div class="card"><small>{escape(name)}</small><b>{value}</b><small>{note}</small></div>'
        for name, value, note in cards
    )


def _plots(pngs: dict[str, bytes]) -> str:
    figures = "".join(
        f'<figure><img alt="{escape(plot.title)}" src="data:image/png;base64,'
        f'{base64.b64encode(pngs[plot.name]).decode()}">'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>\n"
        for plot in PLOTS
        if plot.name in pngs
    )
    skipped = [
        f"{escape(plot.title)} (needs {escape(' or '.join(plot.keys))})"
        for plot in PLOTS
        if plot.name not in pngs
    ]
    note = f"<p>Not drawn, because the run did not log it: {'; '.join(skipped)}.</p>"
    return f'<div class="plots">{figures}</div>' + (note if skipped else "")


def _summary_table(rows: Iterable[SummaryRow]) -> str:
    body = [
        (
            row.key,
            f"{row.first:.6g}",
            f"{row.last:.6g}",
            "" if row.best is None else f"{row.best:.6g}",
            "" if row.best_step is None else str(row.best_step),
        )
        for row in rows
    ]
    return _table(("metric", "first", "last", "best", "at step"), body, css="numbers")


def _memory(path: Path) -> str:
    """Return what workers held beside what the plan said; "" for a run that did not tell."""
    try:
        record = parse_json(path.read_bytes())
        what = str(record["what"])
        rows = [
            (str(row["phase"]), float(row["estimated_gib"]), float(row["measured_gib"]))
            for row in record["rows"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    cells = [
        (phase, f"{estimated:.2f}", f"{measured:.2f}", f"{estimated / measured:.3f}")
        for phase, estimated, measured in rows
        if measured
    ]
    note = f"<p>GiB of {escape(what)}: the plan's estimate, and the most that was measured.</p>"
    header = ("phase", "estimated", "measured", "ratio")
    return f"<h2>Memory</h2>\n{note}" + _table(header, cells, css="numbers")


def _samples(path: Path) -> str:
    records = read_records(path) if path.exists() else []
    if not records:
        return f"<p>The run has no {SAMPLES_FILE}.</p>"
    last_step = records[-1]["step"]
    keys = ("split", "uid", "prompt", "response", "ground_truth", "reward", "finish_reason")
    rows = [
        [value if isinstance(value := record.get(key), str) else json.dumps(value) for key in keys]
        for record in records
        if record["step"] == last_step
    ]
    return f"<p>Of step {last_step}.</p>" + _table(keys, rows, css="texts")


def _config(config: dict[str, Any]) -> str:
    if not config:
        return f"<p>The run has no {CONFIG_FILE}.</p>"
    values = ((key, value_of(config, key)) for key in CONFIG_KEYS)
    rows = [(key, str(value)) for key, value in values if value is not None]
    everything = escape(OmegaConf.to_yaml(OmegaConf.create(config)))
    return (
        _table(("setting", "value"), rows, css="texts")
        + f"<details><summary>The whole configuration</summary><pre>{everything}</pre></details>"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], css: str) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f'<table class="{css}"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 1240px; padding: 32px 24px 64px; color: #0f172a;
  background: #f8fafc; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }}
h1 {{ margin: 0 0 20px; font-size: 28px; }}
h2 {{ margin: 40px 0 12px; font-size: 19px; }}
p, figcaption, small, summary {{ color: #64748b; }}
.cards {{ display: flex; flex-wrap: wrap; gap: 12px; }}
.card {{ flex: 1 1 150px; display: flex; flex-direction: column; padding: 12px 16px; }}
.card b {{ font-size: 24px; line-height: 1.35; }}
.card, figure, table, pre {{ background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 16px; }}
figure {{ margin: 0; padding: 12px 16px; }}
figure img {{ width: 100%; display: block; }}
figcaption {{ font-size: 13px; }}
table {{ border-spacing: 0; width: 100%; overflow: hidden; }}
th, td {{ padding: 7px 14px; text-align: left; vertical-align: top; }}
td {{ border-top: 1px solid #e2e8f0; white-space: pre-wrap; overflow-wrap: anywhere; }}
td, pre {{ font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }}
th {{ background: #f1f5f9; font-size: 13px; }}
.numbers td:not(:first-child), .numbers th:not(:first-child) {{ text-align: right; }}
pre {{ padding: 12px 16px; overflow-x: auto; }}
details {{ margin-top: 12px; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="cards">{cards}</div>
<h2>Curves</h2>
{plots}
<h2>Summary</h2>
{summary}
{memory}
<h2>Last samples</h2>
{samples}
<h2>Configuration</h2>
{config}
</body>
</html>
"""
