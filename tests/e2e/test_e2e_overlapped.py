"""Generation beside training, by real engines in processes of their own.

`pytest -m slow tests/e2e/test_e2e_overlapped.py -rP` kills and stops again and again.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.e2e import commands
from tests.e2e.faulty_engine import ENVIRONMENT, FAULT, ONCE
from tests.e2e.stage_marks import KILL_AT, MARKED, WORKER

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

NUM_STEPS, NUM_PROMPTS, GROUP = 4, 8, 4
AHEAD = (
    "trainer.loop=overlapped",
    "trainer.max_staleness=2",
    "rollout.host=process",
    f"trainer.total_training_steps={NUM_STEPS}",
    f"trainer.log_val_generations={NUM_PROMPTS * GROUP}",  # all samples of a step
    "trainer.test_freq=-1",
)


def check_account(run_dir):
    """Every prompt of the epoch is trained on once, and all that was generated is accounted for;
    return the metrics of the steps."""
    lines = [line for line in commands.read_metrics(run_dir) if "ledger/trained/prompts" in line]
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    # A request that had to wait for its turn may be answered by newer weights than it was given.
    assert max(line["rollout/staleness/max"] for line in lines) <= 2
    last = lines[-1]
    assert last["ledger/trained/prompts"] == NUM_STEPS * NUM_PROMPTS
    assert last["ledger/trained/samples"] == NUM_STEPS * NUM_PROMPTS * GROUP
    assert last["ledger/generated/tokens"] == last["ledger/trained/tokens"]
    samples = commands.read_lines(run_dir / "samples.jsonl")
    drawn = Counter(line["uid"] for line in samples if line["split"] == "train")
    assert set(drawn.values()) == {GROUP}
    assert len(drawn) == NUM_STEPS * NUM_PROMPTS
    return lines


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_run_whose_processes_are_killed_at_random_moments_trains_on_each_prompt_once(
    files, tmp_path, max_staleness
):
    """Controller, worker and engine ten times each, in the first or second step after a start."""
    source, num_each, num_epochs = random.Random(max_staleness), 10, 9
    argv = [
        *(*AHEAD, "trainer.logger=[stage_marks]", "trainer.save_freq=1"),
        *("trainer.n_gpus_per_node=1", "actor.megatron.expert_model_parallel_size=1"),
        f"trainer.max_staleness={max_staleness}",
        f"trainer.total_training_steps={num_epochs * NUM_STEPS}",
    ]
    victims = ["controller", "0", "engine"] * num_each
    source.shuffle(victims)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for victim in victims:
        stage = source.choice(["rollout", "reward", "train", "weight_sync", "checkpoint"])
        at = f"{stage} {source.choice((1, 2))} {source.random() * 0.3}"
        strike = {KILL_AT: at, WORKER: f"{victim} SIGKILL"}
        done = commands.run(*files.argv(killed, *argv), environment=MARKED | strike)
        assert done.returncode != 0, f"{victim} at {at}:\n{done.stderr}"
    done = commands.run(*files.argv(killed, *argv), environment=MARKED)
    assert done.returncode == 0, done.stderr
    metrics = commands.read_metrics(killed)
    last = [line for line in metrics if "ledger/trained/prompts" in line][-1]
    assert last["ledger/trained/prompts"] == num_epochs * NUM_STEPS * NUM_PROMPTS
    assert last["ledger/generated/tokens"] == last["ledger/trained/tokens"]
    samples = commands.read_lines(killed / "samples.jsonl")
    for epoch in range(num_epochs):
        steps = range(epoch * NUM_STEPS, (epoch + 1) * NUM_STEPS)
        of_epoch = [x for x in samples if x["split"] == "train" and x["step"] in steps]
        drawn = Counter(line["uid"] for line in of_epoch)
        assert set(drawn.values()) == {GROUP}
        assert len(drawn) == NUM_STEPS * NUM_PROMPTS
    if max_staleness == 0:
        done = commands.run(*files.argv(whole, *argv), environment=MARKED)
        assert done.returncode == 0, done.stderr
        assert commands.read_metrics(whole) == metrics


def test_a_run_that_is_killed_and_resumed_trains_on_each_prompt_once_and_is_replayed(
    files, prepared, tmp_path
):
    """The engines work on two requests at a time, so that weights come in the middle of many. That
    they do depends on the machine's other work; the test below makes sure of it."""
    run_dir = tmp_path / "run"
    slow = ["data.max_response_length=48", "rollout.max_num_seqs=2"]
    argv = files.argv(run_dir, *AHEAD, *slow, "trainer.save_freq=1")
    argv = [*argv, "trainer.logger=[stage_marks]"]
    killed = prepared.run(*argv, environment=MARKED | {KILL_AT: "train 2 0"})
    assert killed.returncode == -9
    done = prepared.run(*argv, environment=MARKED)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {run_dir}/checkpoints/global_step_1" in done.stderr
    check_account(run_dir)
    replayed = prepared.run(str(run_dir), module="mcore_rl.replay")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert f"equal   {NUM_STEPS + 1} steps: " in replayed.stdout
    replay = run_dir / "replays" / "1"
    assert [line["step"] for line in commands.read_metrics(replay)] == list(range(NUM_STEPS + 1))


def test_stragglers_are_stopped_by_an_engine_that_sleeps_while_the_trainer_works(
    files, prepared, tmp_path
):
    """The engine works on a few requests at a time, so that the last groups are not begun with. It
    goes on after a sleep, with the weights that came meanwhile; the run is replayed."""
    run_dir, num_steps, num_drawn = tmp_path / "run", 3, NUM_PROMPTS + 2
    stops = [
        *("rollout.stop_stragglers=true", f"data.gen_batch_size={num_drawn}"),
        *("rollout.max_num_seqs=4", "data.max_response_length=48"),
        *(
            "rollout.sleep_level=1",
            "trainer.max_staleness=1",
            f"trainer.total_training_steps={num_steps}",
        ),
    ]
    done = prepared.run(*files.argv(run_dir, *AHEAD, *stops))
    assert done.returncode == 0, done.stderr
    lines = [x for x in commands.read_metrics(run_dir) if "ledger/trained/prompts" in x]
    assert [line["step"] for line in lines] == list(range(num_steps))
    last = lines[-1]
    assert last["ledger/trained/prompts"] == num_steps * NUM_PROMPTS
    assert last["ledger/generated/prompts"] == num_steps * num_drawn
    given_up = [value for key, value in last.items() if "discarded" in key and "prompts" in key]
    assert sum(given_up) == num_steps * (num_drawn - NUM_PROMPTS)
    assert last["ledger/discarded/straggler/prompts"] > 0
    assert {line["rollout/failed_frac"] for line in lines} == {0.0}
    assert sum(line["rollout/several_versions_frac"] for line in lines) > 0
    replayed = prepared.run(str(run_dir), module="mcore_rl.replay")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert f"equal   {num_steps + 1} steps: " in replayed.stdout


FAULTS = [
    f"{kind} {moment}"
    # Four steps, two ahead: nothing is begun after weights 1.
    for moment in ("generate 1", "update 1", "update 2", "update 3", "generate 1")
    for kind in ("SIGKILL", "SIGSTOP")
]
USUAL = ("SIGKILL generate 1", "SIGKILL update 2", "SIGSTOP generate 1")


@pytest.mark.parametrize(
    "fault",
    [
        *USUAL,
        *(
            pytest.param(fault, marks=pytest.mark.slow, id=f"{fault}, {number}")
            for number, fault in enumerate((FAULTS * 2)[:20])
        ),
    ],
)
def test_an_engine_that_fails_beside_training_is_started_again_and_nothing_is_lost(
    files, prepared, tmp_path, fault
):
    run_dir, once = tmp_path / "run", tmp_path / "once"
    argv = files.argv(
        run_dir,
        *AHEAD,
        "rollout.name=faulty",
        "rollout.logprob_tolerance=1000",
        "rollout.max_engine_restarts=1",
    )
    done = prepared.run(*argv, environment={**ENVIRONMENT, FAULT: fault, ONCE: str(once)})
    assert once.exists(), f"the fault did not happen:\n{done.stderr}"
    assert done.returncode == 0, done.stderr
    assert "it is started again, 0 more times at most" in done.stderr
    check_account(run_dir)
