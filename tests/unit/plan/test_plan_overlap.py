"""Generation beside training as the planner simulates it: closed forms, and the table.

Against the loop itself it is held in tests/unit/loop/test_loop_overlap_timing.py.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.config.checks import check_run
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig
from mcore_rl.loop.buffer import Buffer
from mcore_rl.plan.memory import route_bytes_per_token
from mcore_rl.plan.overlap import Doing, Fleet, Overlap, StepSeconds, alone, simulate
from mcore_rl.plan.overlap_report import WAITING_TOKEN_BYTES
from mcore_rl.plan.report import write_plan
from mcore_rl.plan.times import MeasuredTimes, long_tailed, measured_times
from mcore_rl.rollout.base import GenerationResult
from tests.published_models import QWEN3_30B_A3B

ONE = Fleet(num_engines=1, slots=8)


def steady(max_staleness, step, *, generate=8.0, num=8, fleet=ONE, steps=24):
    """Return the steps in the mean whose every request takes `generate` seconds, when all have
    begun and none has ended."""
    draws = [[[generate]] * num] * steps
    found = simulate(draws, fleet, step, max_staleness)
    return Overlap.of(found[max_staleness + 2 : -max_staleness - 2])


@pytest.mark.parametrize("train", [3.0, 8.0, 20.0])
def test_without_staleness_a_step_is_the_sum_of_its_stages(train):
    mean = steady(0, StepSeconds(train=train, reward=2.0, sync=1.0))
    assert mean.step_s == pytest.approx(8 + 2 + train + 1)
    assert mean.shares[Doing.WAIT] == mean.engines_busy == pytest.approx(8 / mean.step_s)
    assert mean.overlap == 0
    assert mean.oldest == 0


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
@pytest.mark.parametrize(("reward", "train"), [(0.0, 3.0), (2.0, 3.0), (0.0, 8.0), (2.0, 20.0)])
def test_beside_training_a_step_is_the_longer_side_and_the_sync(max_staleness, reward, train):
    mean = steady(max_staleness, StepSeconds(train=train, reward=reward, sync=1.0))
    assert mean.step_s == pytest.approx(max(8, reward + train) + 1)
    assert mean.shares[Doing.WAIT] == pytest.approx(max(0, 8 - reward - train) / mean.step_s)
    # While the trainer is the longer side the engines are done before the sync.
    busy = 8 if reward + train > 8 else mean.step_s
    if (reward + train) != 8:
        assert mean.engines_busy == pytest.approx(busy / mean.step_s)


def test_with_slots_for_several_steps_these_are_generated_at_once():
    """Step s + 1 is begun when step s - 1 has ended, and has two steps for its 8 seconds."""
    fleet = Fleet(num_engines=1, slots=16)
    mean = steady(1, StepSeconds(train=3.0, sync=1.0), fleet=fleet)
    assert mean.step_s == pytest.approx((8 + 3) / 2 + 1)


def test_what_runs_at_a_sync_is_computed_again():
    """Of the 8 requests each has run for the 3 seconds of training when it is paused."""
    mean = steady(1, StepSeconds(train=3.0, sync=1.0, recompute=0.05))
    assert mean.step_s == pytest.approx(8 + 1 + 0.05 * 8 * 3)


def test_requests_wait_for_a_slot_and_the_slowest_engine_counts():
    fleet = Fleet(num_engines=3, slots=2)
    assert alone([[[1.0] * 4] * 4], fleet) == 4.0  # the first engine has two groups of four
    assert alone([[[5.0, 1.0, 1.0, 1.0, 1.0]]], Fleet(num_engines=1, slots=2)) == 5.0
    assert alone([[[2.0]], [[4.0]]], fleet) == 3.0  # the mean over steps


def test_requests_that_waited_for_a_slot_are_drawn_by_the_weights_of_then():
    """Generation takes 40 s, training 1 s: what is admitted two steps ahead begins one ahead."""
    draws = [[[10.0]] * 4] * 10
    steps = simulate(draws, Fleet(num_engines=1, slots=1), StepSeconds(train=1.0), 3)
    assert [step.oldest for step in steps] == [0, *[1] * 9]


def test_steps_are_admitted_as_the_buffer_of_the_loop_admits_them():
    """An engine that answers at once: what a step is drawn by is what its admission waited for."""
    for max_staleness in range(4):
        buffer, admitted_at = Buffer[int](0, 10, max_staleness), {}
        for step in range(10):
            while (ahead := buffer.to_admit) is not None:
                buffer.admit(ahead)
                admitted_at[ahead] = step
            buffer.take(step)
            buffer.published(step + 1)
        fleet = Fleet(num_engines=1, slots=10)
        steps = simulate([[[0.5]]] * 10, fleet, StepSeconds(train=1.0), max_staleness)
        assert [step.oldest for step in steps] == [s - admitted_at[s] for s in range(10)]


SECONDS = st.floats(0.1, 50.0)
DRAWS = st.lists(
    st.lists(st.lists(SECONDS, min_size=2, max_size=2), min_size=3, max_size=3),
    min_size=4,
    max_size=8,
)


@given(
    draws=DRAWS,
    fleet=st.builds(Fleet, num_engines=st.integers(1, 3), slots=st.integers(1, 8)),
    step=st.builds(StepSeconds, train=SECONDS, reward=SECONDS, sync=SECONDS),
    max_staleness=st.integers(0, 4),
)
def test_no_age_exceeds_its_bound_and_going_further_ahead_never_takes_longer(
    draws, fleet, step, max_staleness
):
    steps = simulate(draws, fleet, step, max_staleness)
    assert all(0 <= s.oldest <= max_staleness for s in steps)
    whole = sum(sum(s.seconds.values()) for s in steps)
    further = simulate(draws, fleet, step, max_staleness + 1)
    assert sum(sum(s.seconds.values()) for s in further) <= whole * (1 + 1e-9)
    trainer = len(draws) * (step.reward + step.train + step.sync)
    slot = sum(s for of in draws for group in of for s in group) / fleet.num_engines / fleet.slots
    assert whole >= max(trainer, slot) * (1 - 1e-9)
    for s in steps:
        assert all(0 <= s.busy[doing] <= s.seconds[doing] + 1e-9 for doing in Doing)


def test_long_tailed_draws_have_their_mean_and_their_longest():
    for num, mean, longest in ((64, 300.0, 1500.0), (4096, 800.0, 8000.0)):
        draws = [long_tailed(num, mean, longest, math.inf, random.Random(i)) for i in range(100)]
        # 100 x 64 draws of a standard deviation like the mean: 1.3 percent; the longest of them
        # varies by half of itself.
        assert statistics.fmean(map(statistics.fmean, draws)) == pytest.approx(mean, rel=0.05)
        assert statistics.median(map(max, draws)) == pytest.approx(longest, rel=0.15)
        assert long_tailed(num, mean, longest, math.inf, random.Random(3)) == draws[3]
    assert max(long_tailed(64, 300.0, 1500.0, 900.0, random.Random(0))) == 900.0
    assert long_tailed(3, 7.0, 7.0, 9.0, random.Random(0)) == pytest.approx([7.0] * 3)


def line(step, **changes):
    return {
        "step": step,
        "time/step": 100.0,
        "time/rollout": 40.0,
        "time/reward": 5.0,
        "time/train": 40.0,
        "time/weight_sync": 3.0,
        "perf/engines_busy_frac": 0.3,
        "rollout/response_tokens/mean": 50.0,
        "rollout/response_tokens/max": 200.0,
    } | changes


def write(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_times_are_those_of_the_steps_that_only_train(tmp_path):
    assert measured_times(tmp_path) is None
    first, validates = line(0, **{"time/rollout": 900.0}), line(1, **{"time/eval": 7.0})
    write(tmp_path, first, validates, {"step": 9, "time/step": 8.0, "eval/x/accuracy": 0.5})
    assert measured_times(tmp_path) is None
    write(tmp_path, line(1, **{"time/rollout": math.nan}), line(2, **{"time/rollout": 0.0}))
    assert measured_times(tmp_path) is None
    kept = line(3, **{"time/checkpoint": 10.0, "time/rollout": 42.0, "time/reward": 3.0})
    longer = line(4, **{"rollout/response_tokens/max": 260.0})
    write(tmp_path, first, validates, line(2), kept, longer)
    assert measured_times(tmp_path) == MeasuredTimes(
        num_steps=3, generate=40.0, reward=5.0, train=52.0, sync=3.0, mean=50.0, longest=220.0
    )
    # Beside training the trainer waits for less than the engines take.
    write(tmp_path, line(1, **{"time/rollout": 2.0, "perf/engines_busy_frac": 0.7}))
    found = measured_times(tmp_path)
    assert found is not None
    assert found.generate == pytest.approx(70.0)
    assert found.train == pytest.approx(90.0)


@pytest.fixture
def argv(tmp_path):
    """Return the arguments of a run with engines on devices of their own."""
    QWEN3_30B_A3B.save_pretrained(tmp_path)
    row = {"prompt": "x" * 400, "ground_truth": "1", "data_source": "math"}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(row)] * 64))
    return [
        *["--config-name", "gmpo", f"model.path={tmp_path}", "trainer.dry_run=true"],
        f"data.train_files={tmp_path / 'train.jsonl'}",
        f"trainer.default_local_dir={tmp_path / 'run'}",
        *["data.train_batch_size=64", "actor.ppo_mini_batch_size=64", "rollout.n=4"],
        *["data.max_response_length=512", "actor.ppo_max_token_len_per_gpu=2048"],
        *["trainer.n_gpus_per_node=8", "actor.megatron.expert_model_parallel_size=8"],
    ]


APART = ["rollout.host=process", "rollout.nnodes=1", "rollout.n_gpus_per_node=8"]
APART += ["rollout.tensor_model_parallel_size=4"]


def planned(capsys, argv):
    """Return the lines of the table, and its rows by max_staleness; none where there is none."""
    cfg = compose_config(RunConfig, parse_command_line("train", "", argv))
    check_run(cfg)
    write_plan(cfg)
    lines = capsys.readouterr().out.splitlines()
    begin = [number for number, line in enumerate(lines) if line.startswith("overlap ")]
    table = lines[begin[0] :] if begin else []
    rows = [line.split() for line in table if line.split()[0].isdigit() and "engines" not in line]
    return table, {int(age): row for age, *row in rows}


def test_a_plan_shows_what_staleness_brings_where_engines_are_apart_or_the_loop_overlaps(
    argv, capsys
):
    assert planned(capsys, argv) == ([], {})
    table, rows = planned(capsys, [*argv, *APART])
    assert list(rows) == [0, 1, 2, 4]
    assert table[1].startswith("  2 engines of 128 requests at a time; generation ")
    assert "estimates from formulas (plan/step_time.py) for an H100" in table[2]
    generate, _, train, sync = map(float, re.findall(r"(\d+\.\d) s", table[1]))
    seconds = {age: float(row[0]) for age, row in rows.items()}
    assert seconds[0] == pytest.approx(generate + train + sync, abs=0.25)  # each is rounded
    # Of unlike lengths: beside the last of a step those of the next are drawn.
    assert train + sync - 0.2 <= seconds[1] <= max(generate, train) + sync + 0.2 < seconds[0]
    held = {age: float(row[5]) for age, row in rows.items()}
    a_step = (held[4] - held[0]) / 4  # that waits
    assert 0 < a_step < held[0]
    assert list(held.values()) == pytest.approx([held[0] + age * a_step for age in rows], abs=0.002)
    overlaps = ["trainer.loop=overlapped", "trainer.max_staleness=3"]
    assert list(planned(capsys, [*argv, *APART, *overlaps])[1]) == [0, 1, 2, 3, 4]


def test_a_plan_takes_times_from_the_run_folder(argv, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write(run, line(0), line(1), line(2))
    table, rows = planned(capsys, [*argv, *APART])
    assert "generation 40.0 s, rewards 5.0 s, training 52.0 s, weight sync 3.0 s" in table[1]
    assert f"medians of 2 steps in {run}; responses of 50 tokens in the mean" in table[2]
    assert float(rows[0][0]) == pytest.approx(100, rel=0.1)  # other draws than were measured
    assert float(rows[1][0]) == pytest.approx(60, rel=0.01)  # train-bound


def test_engines_that_sleep_do_not_generate_beside_training(argv, capsys):
    sleeps = ["trainer.loop=overlapped", "rollout.host=process", "rollout.sleep_level=1"]
    table, rows = planned(capsys, [*argv, *sleeps])
    assert rows == {}
    assert "not of engines that sleep while the trainer works" in table[1]


def test_routes_are_shown_where_they_are_replayed(argv, capsys):
    replays = ["trainer.loop=overlapped", "actor.router_replay.mode=R3"]
    more = ["rollout.tensor_model_parallel_size=4", "rollout.n=128"]
    table, rows = planned(capsys, [*argv, *replays, *more])
    assert "share devices" in table[3]
    assert table[4].endswith("  routes GiB")
    # 64 x 128 samples of 100 and about 256 tokens, 48 layers, 8 experts of a byte each
    assert float(rows[0][6]) == pytest.approx(64 * 128 * 356 * 48 * 8 / 2**30, abs=0.1)
    assert float(rows[4][6]) == pytest.approx(5 * float(rows[0][6]), abs=0.3)


def test_bytes_of_a_token_are_those_of_a_sample_and_of_its_routes():
    result = GenerationResult(
        token_ids=np.array([1, 2, 3], np.int32),
        logprobs=np.full(3, -1.0, np.float32),
        finish_reason="stop",
        versions=[],
    )
    held = result.token_ids.nbytes + result.logprobs.nbytes
    assert held == 3 * WAITING_TOKEN_BYTES
    experts = {"moe_layer_freq": [0, 1, 1], "moe_router_topk": 4}
    routes = np.zeros((3, 2, 4), np.uint8)
    assert 3 * route_bytes_per_token({**experts, "num_moe_experts": 256}) == routes.nbytes
    assert route_bytes_per_token({**experts, "num_moe_experts": 257}) == 2 * 4 * 2
    assert route_bytes_per_token({}) == 0
