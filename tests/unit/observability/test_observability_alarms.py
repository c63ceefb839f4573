"""Each alarm fires in a run in which its sign appears, and none does in a healthy quickstart.

The healthy run is a whole quickstart, `tests/data/quickstart_metrics.jsonl`: the seven metrics of
its 120 steps, to four digits. A bad run is that one with a single metric changed from step 60 on.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mcore_rl.observability import alarms
from mcore_rl.observability.alarms import ALARMS, explanations
from mcore_rl.observability.columns import Series, to_columns
from mcore_rl.observability.jsonl import read_metrics
from tests.unit.observability.report_runs import reported, write_lines

ROOT = Path(__file__).parents[3]
HEALTHY = read_metrics(ROOT / "tests" / "data" / "quickstart_metrics.jsonl")
BEGIN = 60
"""Step from which on a bad run is bad."""


def changed(key, change):
    """Return the healthy run with `change(value, step)` in place of the values from BEGIN on."""
    return [
        record | {key: change(record[key], record["step"])} if record["step"] >= BEGIN else record
        for record in HEALTHY
    ]


BAD = {
    # Ten times more every ten steps, from 3e-7 on: above 1e-4 on average soon after step 85.
    "Mismatch trend": ("mismatch/logprob_abs_diff/mean", lambda v, s: v * 10 ** ((s - 60) / 10)),
    "Entropy collapse": ("actor/entropy", lambda v, s: v * 0.7 ** (s - BEGIN)),
    "Gradient norm": ("actor/grad_norm", lambda v, s: v * (50 if s % 20 == 0 else 1)),
    "Zero-variance groups": ("reward/zero_std_group_frac", lambda v, s: 0.97),
    "Truncation": ("rollout/truncated_frac", lambda v, s: min(1.0, (s - BEGIN) / 20)),
    "Response length": ("rollout/response_tokens/mean", lambda v, s: v * 1.1 ** (s - BEGIN)),
    "Failed rewards": ("reward/failed_frac", lambda v, s: 0.05 if s == 77 else v),
}


def fired(records):
    """Return the steps of the alarms that fired, by title."""
    columns = to_columns(records)
    found = {alarm.title: alarm.fired(columns) for alarm in ALARMS}
    return {title: steps for title, steps in found.items() if steps}


def test_no_alarm_fires_in_a_healthy_quickstart():
    assert len(HEALTHY) == 120
    assert all(set(record) == {"step", *(alarm.key for alarm in ALARMS)} for record in HEALTHY)
    assert fired(HEALTHY) == {}


@pytest.mark.parametrize("title", [alarm.title for alarm in ALARMS])
def test_an_alarm_fires_in_a_bad_run_and_no_other_does(title):
    key, change = BAD[title]
    assert key == next(alarm.key for alarm in ALARMS if alarm.title == title)
    steps = fired(changed(key, change))
    assert set(steps) == {title}
    assert BEGIN <= steps[title][0] <= BEGIN + 30


def test_seven_alarms_have_a_section_each_in_the_docs():
    assert set(explanations()) == {alarm.title for alarm in ALARMS} == set(BAD)
    page = (ROOT / "docs" / "alarms.md").read_text()
    for alarm in ALARMS:
        assert f"\n## {alarm.title}\n" in page
        assert alarm.anchor == "".join(
            c for c in alarm.title.lower() if c.isalpha() or c in " -"
        ).replace(" ", "-")
    assert len({alarm.anchor for alarm in ALARMS}) == 7


def series(*values):
    return Series(list(range(len(values))), list(values))


def test_a_mismatch_below_what_float32_explains_is_no_trend():
    rising = [1e-8 * 1.1**i for i in range(90)]
    assert max(rising) < 1e-4
    assert alarms.mismatch_trend(series(*rising)) == []
    assert alarms.mismatch_trend(series(*[0.02] * 50)) == []  # bfloat16, level
    steps = alarms.mismatch_trend(series(*[0.02] * 20, *[0.2] * 20))
    # 0.02 * (10 - n) / 10 + 0.2 * n / 10 is above 0.06 from n = 3 on.
    assert steps == list(range(22, 40))


def test_a_gradient_that_is_not_finite_fires_at_once_and_spoils_no_median():
    values = [1.0] * 25
    values[3], values[7] = math.nan, math.inf
    assert alarms.gradient_norm(series(*values, 11.0, 9.0)) == [3, 7, 25]


def test_a_gradient_is_compared_with_twenty_steps_before_it():
    assert alarms.gradient_norm(series(*[1.0] * 19, 100.0)) == []
    assert alarms.gradient_norm(series(*[1.0] * 20, 100.0)) == [20]
    # A warm-up that rises slowly never jumps over its own median.
    assert alarms.gradient_norm(series(*[1.1**i for i in range(80)])) == []


def test_a_slow_change_of_length_is_no_alarm_and_a_jump_of_either_kind_is():
    assert alarms.response_length(series(*[100 * 1.02**i for i in range(200)])) == []
    longer = alarms.response_length(series(*[100.0] * 30, *[400.0] * 30))
    shorter = alarms.response_length(series(*[400.0] * 30, *[100.0] * 30))
    # Means of 5: above 200 with two steps at 400, below 200 with four at 100. Over 20 steps later.
    assert longer[0] == 31
    assert shorter[0] == 33
    assert max(longer[-1], shorter[-1]) < 59


def test_a_run_of_few_steps_fires_only_what_needs_no_window():
    records = [{key: 1.0 for key, _ in BAD.values()} | {"step": step} for step in range(3)]
    assert fired(records) == {"Failed rewards": [0, 1, 2]}


def test_a_metric_that_was_not_logged_is_told_from_one_that_is_quiet(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": s, "actor/grad_norm": 1.0} for s in range(9)])
    shown = dict(zip((alarm.title for alarm in ALARMS), reported(tmp_path)["alarms"], strict=True))
    assert shown["Gradient norm"] == {"ranges": [], "num_steps": 0, "value": None}
    assert shown["Truncation"] == {"ranges": None, "num_steps": 0, "value": None}


def test_the_report_says_where_an_alarm_fired_as_ranges_of_logged_steps(tmp_path):
    failed = {0: 0.0, 2: 0.5, 4: 0.25, 6: 0.0, 8: 0.75}
    write_lines(
        tmp_path / "metrics.jsonl",
        [{"step": step, "reward/failed_frac": value} for step, value in failed.items()],
    )
    assert reported(tmp_path)["alarms"][-1] == {
        "ranges": [[2, 4], [8, 8]],
        "num_steps": 3,
        "value": "0.5",
    }
