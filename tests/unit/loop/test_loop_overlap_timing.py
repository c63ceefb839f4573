"""How long steps of the overlapped loop take, on a virtual clock, beside what the plan simulates.

The engines here draw token by token, in steps of all running requests; the simulation knows of each
request when it is given, and how long it takes.
"""

from __future__ import annotations

import functools
import random
import statistics

import pytest

from mcore_rl.plan.overlap import Overlap, alone, simulate
from mcore_rl.plan.times import long_tailed as draw
from mcore_rl.plan.times import measured_times
from tests.unit.loop.overlap_runs import (
    GROUP,
    MOST_TOKENS,
    STEPS,
    Setting,
    in_groups,
    long_tailed,
    measure,
    steady,
)
from tests.unit.loop.virtual_cluster import Latencies

S, L = steady, long_tailed
# Times of the trainer are no multiples of a token's, so that pauses come in the middle of one.
SETTINGS = {
    "steady, nothing overlaps": Setting(
        max_staleness=0,
        length_of=S,
        seconds=Latencies(token=1.0, update=30.3, sync=2.1, reward=5.2),
    ),
    "steady, generation-bound": Setting(
        max_staleness=1, length_of=S, seconds=Latencies(token=1.0, update=30.3, sync=2.1)
    ),
    "steady, train-bound": Setting(
        max_staleness=1,
        length_of=S,
        seconds=Latencies(token=0.25, update=20.3, logprobs=17.7, sync=1.1, reward=2.2),
        updates=2,
    ),
    "steady, balanced, slow rewards": Setting(
        max_staleness=1,
        length_of=S,
        seconds=Latencies(token=0.25, update=40.3, sync=1.1, reward=10.2),
    ),
    "steady, balanced, two engines": Setting(
        max_staleness=1,
        length_of=S,
        seconds=Latencies(token=0.5, update=40.3, sync=1.1),
        num_engines=2,
    ),
    "steady, a slot for each of three steps": Setting(
        max_staleness=2,
        length_of=S,
        seconds=Latencies(token=1.0, update=10.3, sync=1.1),
        slots=96,
    ),
    "long-tailed, nothing overlaps": Setting(
        max_staleness=0, length_of=L, seconds=Latencies(token=0.5, update=50.3, sync=1.1)
    ),
    "long-tailed, generation-bound": Setting(
        max_staleness=1, length_of=L, seconds=Latencies(token=0.5, update=15.3, sync=1.1)
    ),
    "long-tailed, train-bound": Setting(
        max_staleness=1,
        length_of=L,
        seconds=Latencies(token=0.25, update=70.3, sync=1.1, reward=6.3),
    ),
    "long-tailed, balanced": Setting(
        max_staleness=1, length_of=L, seconds=Latencies(token=0.5, update=110.3, sync=1.1)
    ),
    "long-tailed, two engines that compute again": Setting(
        max_staleness=2,
        length_of=L,
        seconds=Latencies(token=0.5, update=25.3, sync=4.1, reward=7.3, computed_token=0.004),
        prompts=16,
        slots=16,
        num_engines=2,
        updates=2,
    ),
    "long-tailed, three engines, four steps ahead": Setting(
        max_staleness=4,
        length_of=L,
        seconds=Latencies(token=0.5, update=20.3, sync=1.1),
        prompts=12,
        num_engines=3,
        slots=12,
    ),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return a function: name of a setting -> what its run took."""
    return functools.cache(lambda name: measure(tmp_path_factory.mktemp("run"), SETTINGS[name]))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_simulation_says_how_long_the_steps_of_the_loop_take(measured, name):
    setting, found = SETTINGS[name], measured(name)
    steps = simulate(found.draws, setting.fleet, setting.step, setting.max_staleness)
    mean = Overlap.of(steps)
    # A pause waits for the token that is being drawn: at most 1.1 percent are seen.
    assert found.step_s == pytest.approx(mean.step_s, rel=0.02)
    assert found.busy == pytest.approx(mean.engines_busy, abs=0.02)
    assert found.oldest == [step.oldest for step in steps]


@pytest.mark.parametrize("name", [name for name in SETTINGS if SETTINGS[name].length_of is L])
def test_the_planner_need_not_know_the_lengths_that_will_be_drawn(measured, name):
    """It draws others, of the same mean and with a longest one as steps have it in the mean."""
    setting, found = SETTINGS[name], measured(name)
    of_steps = [[num for group in groups for num in group] for groups in found.draws]
    mean = statistics.fmean(map(statistics.fmean, of_steps))
    longest = statistics.fmean(map(max, of_steps))
    most = MOST_TOKENS * setting.seconds.token
    drawn = [
        in_groups(draw(setting.prompts * GROUP, mean, longest, most, random.Random(step)), GROUP)
        for step in range(STEPS)
    ]
    steps = simulate(drawn, setting.fleet, setting.step, setting.max_staleness)
    # At most 7.5 percent are seen, of which 20 steps of heavy tails have most.
    assert found.step_s == pytest.approx(Overlap.of(steps).step_s, rel=0.1)


@pytest.mark.parametrize("name", [name for name in SETTINGS if SETTINGS[name].max_staleness == 1])
def test_one_step_ahead_a_step_takes_no_longer_than_generation_or_training(measured, name):
    """Rewards are the trainer's time: they begin when a step has all its responses, and its updates
    when it has all its rewards. A sync stops both sides, and the first step waits for all of its
    generation."""
    setting, found = SETTINGS[name], measured(name)
    generate, rest = alone(found.draws, setting.fleet), setting.step
    trainer = rest.reward + rest.train
    longer = max(generate, trainer)
    assert found.step_s <= 1.1 * longer
    if setting.length_of is S:
        begin = min(generate, trainer) / STEPS
        a_token = setting.seconds.token  # which a pause may wait for
        assert found.step_s <= longer + rest.sync + begin + a_token


def test_a_run_leaves_behind_what_the_planner_reads(measured):
    name = "long-tailed, generation-bound"
    setting, found = SETTINGS[name], measured(name)
    times = measured_times(found.run_dir)
    assert times is not None
    assert times.num_steps == STEPS - 1
    tokens = [
        [seconds / setting.seconds.token for group in groups for seconds in group]
        for groups in found.draws[1:]
    ]
    assert times.mean == pytest.approx(statistics.fmean(map(statistics.fmean, tokens)))
    assert times.longest == pytest.approx(statistics.fmean(map(max, tokens)))
