"""Stage times are wall seconds, add up within a step and start again after each read."""

from __future__ import annotations

import time

import pytest

from mcore_rl.metrics import to_floats
from mcore_rl.observability.timers import StepTimers

PAUSE_S = 0.02


def test_an_outer_stage_contains_its_inner_ones_and_repeats_add_up():
    timers = StepTimers()
    with timers.time("outer"):
        for _ in range(2):
            with timers.time("rollout"):
                time.sleep(PAUSE_S)
    seconds = to_floats(timers.metrics())
    assert set(seconds) == {"time/outer", "time/rollout", "time/step"}
    # sleep never returns early; an upper bound would depend on the machine's load
    assert seconds["time/rollout"] >= 2 * PAUSE_S
    assert seconds["time/step"] >= seconds["time/outer"] >= seconds["time/rollout"]


def test_reading_the_metrics_starts_the_next_step_from_nothing():
    start = time.perf_counter()
    timers = StepTimers()
    with timers.time("train"):
        time.sleep(PAUSE_S)
    first = to_floats(timers.metrics())
    second = to_floats(timers.metrics())
    assert set(first) == {"time/train", "time/step"}
    assert set(second) == {"time/step"}
    assert first["time/step"] + second["time/step"] <= time.perf_counter() - start


def test_a_stage_that_raises_is_still_timed():
    timers = StepTimers()
    start = time.perf_counter()
    with pytest.raises(TypeError), timers.time("train"):
        time.sleep("not a duration")  # pyright: ignore[reportArgumentType]
    assert 0 < to_floats(timers.metrics())["time/train"] <= time.perf_counter() - start
