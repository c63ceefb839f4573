"""The timeline of the report: how long each stage of a step took, and who waited meanwhile.

A step's stages follow one another in the controller, so a row of them is a picture of the step. The
engines work beside them; how much of the step they and the trainer were busy is measured
(`perf/engines_busy_frac`, `perf/trainer_busy_frac`), but not when.

    {"step": 7, "seconds": 2.0, "stages": {"rollout": 0.6, "train": 1.1, "other": 0.3},
     "waits": {"the engines": 0.6, "other work": 0.3}, "engines_busy_s": 0.7, "trainer_busy_s": 1.1}
"""

from __future__ import annotations

import math
from typing import Any

from mcore_rl.observability.columns import Columns
from mcore_rl.observability.report.curves import LARGEST, MOST_POINTS, rounded

MOST_STEPS = 200
"""Last steps of a run that are shown one by one."""

STAGES = {
    "checkpoint": "the checkpoint",  # of the step before: it is written after that step's line
    "eval": "the validation",
    "rollout": "the engines",
    "reward": "the rewards",
    "old_logprobs": None,
    "values": None,
    "train_critic": None,
    "train": None,
    "weight_sync": "the weight sync",
    "other": "other work",  # what no stage covers
}
"""Stages in the order of a step: what the trainer waits for; None if it computes itself."""


def timeline(columns: Columns) -> list[dict[str, Any]]:
    """Return a row for each step that has a time, in their order."""
    times = {
        key.removeprefix("time/"): dict(zip(*series, strict=True))
        for key, series in columns.items()
        if key.startswith("time/")
    }
    shares = [
        dict(zip(*columns.get(f"perf/{who}_busy_frac", ([], [])), strict=True))
        for who in ("engines", "trainer")
    ]
    rows = []
    for step, seconds in times.pop("step", {}).items():
        stages = {stage: of[step] for stage, of in sorted(times.items()) if step in of}
        if not all(0 <= value < LARGEST for value in [seconds, *stages.values()]):
            continue
        engines, trainer = (of.get(step, math.nan) * seconds for of in shares)
        rows.append(
            {
                "step": step,
                "seconds": rounded(seconds),
                "stages": (of_step := _in_order(stages, seconds)),
                "waits": _waits(of_step),
                "engines_busy_s": rounded(engines) if math.isfinite(engines) else None,
                "trainer_busy_s": rounded(trainer) if math.isfinite(trainer) else None,
            }
        )
    return rows


def stretches(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean stages of stretches of steps, at most MOST_POINTS, each with the first and
    the last of its steps."""
    num = min(len(rows), MOST_POINTS)
    found = []
    for i in range(num):
        part = rows[len(rows) * i // num : len(rows) * (i + 1) // num]
        names = dict.fromkeys(name for row in part for name in row["stages"])
        sums = {name: math.fsum(row["stages"].get(name, 0.0) for row in part) for name in names}
        stages = {name: rounded(value / len(part)) for name, value in sums.items()}
        found.append({"first": part[0]["step"], "last": part[-1]["step"], "stages": stages})
    return found


def _in_order(stages: dict[str, float], seconds: float) -> dict[str, float]:
    order = {stage: rank for rank, stage in enumerate(STAGES)}
    ordered = sorted(stages, key=lambda stage: order.get(stage, len(order)))
    other = max(0.0, seconds - math.fsum(stages.values()))
    return {**{stage: rounded(stages[stage]) for stage in ordered}, "other": rounded(other)}


def _waits(stages: dict[str, float]) -> dict[str, float]:
    """Return the seconds for which the trainer waits, by what it waits for."""
    waited = {stage: STAGES.get(stage, stage) for stage in stages}
    return {whom: stages[stage] for stage, whom in waited.items() if whom is not None}
