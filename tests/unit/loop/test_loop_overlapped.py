"""The overlapped loop: the numbers of the on-policy one at staleness 0, and a bound beyond."""

from __future__ import annotations

import json

import pytest

from tests.unit.loop.loop_runs import run_in

ALL = "trainer.log_val_generations=12"  # samples of a step
AHEAD = ("trainer.loop=overlapped",)
FILTERED = (
    "algorithm.filter_groups.enable=true",
    "algorithm.filter_groups.metric=seq_reward",
    "rollout.n=2",
)


def stale(max_staleness: int) -> tuple[str, ...]:
    return (
        *AHEAD,
        f"trainer.max_staleness={max_staleness}",
        "rollout.host=process",
    )


def samples(run):
    return run.lines("samples.jsonl")


@pytest.mark.parametrize("overrides", [(), FILTERED, ("algorithm.adv_estimator=remax",)])
def test_at_staleness_0_it_is_the_on_policy_loop(tmp_path, overrides):
    one = run_in(tmp_path, *overrides, folder="one", num_val=2)
    other = run_in(tmp_path, *overrides, *AHEAD, folder="other", num_val=2)
    added = {
        "rollout/in_flight/prompts",
        "rollout/in_flight/samples",
        "rollout/staleness/updates_max",
    }
    assert one.metrics == [
        {key: v for key, v in line.items() if key not in added} for line in other.metrics
    ]
    assert one.calls == other.calls
    assert samples(one) == samples(other)


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_a_step_trains_on_what_was_begun_before_and_nothing_is_older_than_allowed(
    tmp_path, max_staleness
):
    run = run_in(tmp_path, *stale(max_staleness), steps=6)
    ages = [line["rollout/staleness/max"] for line in run.metrics]
    assert ages == [min(step, max_staleness) for step in range(6)]
    # Of two updates in a step the second trains on samples that are one update older.
    updates = [line["rollout/staleness/updates_max"] for line in run.metrics]
    assert updates == [2 * age + 1 for age in ages]
    calls = [c for c in run.calls if c.startswith(("sync", "generate", "pause", "resume"))]
    begin = [
        *["sync to 0", "generate with 0"],  # the check of the engines
        *["generate with 0"] * (1 + max_staleness),
        *["pause", "sync to 1", "resume", "generate with 1"],
    ]
    assert calls[: len(begin)] == begin
    in_flight = [line["rollout/in_flight/prompts"] for line in run.metrics]
    assert in_flight == [4.0 * min(max_staleness + 1, 6 - step) for step in range(6)]


def test_prompts_come_in_the_same_order_whatever_the_staleness(tmp_path):
    uids = [
        [(line["step"], line["uid"]) for line in samples(run)]
        for run in (
            run_in(tmp_path, ALL, folder="0", steps=5),
            run_in(tmp_path, ALL, *stale(2), folder="2", steps=5),
        )
    ]
    assert uids[0] == uids[1]


@pytest.mark.parametrize("overrides", [(), FILTERED])
@pytest.mark.parametrize("max_staleness", [1, 3])
@pytest.mark.parametrize("crash_at", [("actor.update", 5), ("send_weights", 3)])
def test_a_run_that_crashed_trains_on_each_prompt_once(
    tmp_path, max_staleness, crash_at, overrides
):
    """Five steps of four of ten prompts: in an epoch two steps, and two prompts are left out."""
    keys = (*stale(max_staleness), *overrides, "trainer.save_freq=1", ALL)
    whole = run_in(tmp_path, *keys, folder="whole", steps=5)
    run_in(tmp_path, *keys, folder="crashed", steps=5, crash_at=crash_at)
    resumed = run_in(tmp_path, *keys, folder="crashed", steps=5)
    last = [run.metrics[-1] for run in (whole, resumed)]
    if not overrides:
        drawn = [
            sorted((line["step"], line["uid"]) for line in samples(run)) for run in (whole, resumed)
        ]
        assert drawn[0] == drawn[1]
    for of_run in last:
        assert of_run["ledger/trained/prompts"] == 5 * 4
        assert of_run["ledger/generated/tokens"] == sum(
            value
            for key, value in of_run.items()
            if key.startswith("ledger/") and key.endswith("/tokens") and "generated" not in key
        )


@pytest.mark.parametrize("ask_at", [("generate", 5), ("actor.update", 5), ("send_weights", 3)])
def test_a_run_that_is_asked_to_end_goes_on_with_the_prompts_that_the_engines_had(tmp_path, ask_at):
    keys = (*stale(2), ALL)
    whole = run_in(tmp_path, *keys, folder="whole", steps=5)
    stopped = run_in(tmp_path, *keys, folder="stopped", steps=5, ask_at=ask_at)
    assert len(stopped.metrics) < 5
    resumed = run_in(tmp_path, *keys, folder="stopped", steps=5)
    drawn = [
        sorted((line["step"], line["uid"]) for line in samples(run)) for run in (whole, resumed)
    ]
    assert drawn[0] == drawn[1]
    assert resumed.metrics[-1]["ledger/trained/prompts"] == 5 * 4


def test_a_checkpoint_names_the_prompts_that_the_engines_have(tmp_path):
    run = run_in(tmp_path, *stale(2), "trainer.save_freq=1", steps=4)
    pending = []
    for step in range(1, 5):
        file = run.folder / "checkpoints" / f"global_step_{step}" / "controller.json"
        state = json.loads(file.read_text())
        assert len(state["ahead"]["pending"]) == min(2, 4 - step)
        pending.append([(x["epoch"], x["position"]) for x in state["ahead"]["pending"]])
    assert pending == [[(0, 4), (0, 8)], [(0, 8), (1, 4)], [(1, 4)], []]
