"""Engines in processes of their own: the same numbers as inside the workers, and what happens when
one is killed, hangs or answers what cannot be.

`pytest -m slow tests/e2e/test_e2e_engines.py -rP` does the faults as often as the design asks, and
says after how many seconds a run ended.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e import commands
from tests.e2e.faulty_engine import ENVIRONMENT, FAULT, ONCE

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

STEPS = "trainer.total_training_steps=3"
OWN = "rollout.host=process"
ROOM = (
    "rollout.sleep_level=2",
    "actor.megatron.param_offload=true",
    "actor.megatron.grad_offload=true",
    "actor.megatron.optimizer_offload=true",
    "trainer.save_freq=2",
)
MOST_S = 10.0


def outcome(run_dir):
    """Return metrics and weights of a run."""
    weights = run_dir / "hf_model"
    return commands.read_metrics(run_dir), {
        name: digest
        for name, digest in commands.hash_files(weights).items()
        if name.endswith(".safetensors")
    }


@pytest.fixture(scope="module")
def inside(files, prepared, tmp_path_factory):
    """Metrics and weights of a run with vLLM inside the workers."""
    run_dir = tmp_path_factory.mktemp("engines") / "inside"
    done = prepared.run(*files.argv(run_dir, STEPS))
    assert done.returncode == 0, done.stderr
    return outcome(run_dir)


APART = {
    "shared memory": [],
    "gloo, asleep, offloaded": ["rollout.weight_transport=gloo", *ROOM],
    "disk, of its own devices": [
        "rollout.weight_transport=disk",
        "rollout.nnodes=1",
        "rollout.n_gpus_per_node=1",
        "rollout.update_weights_bucket_mib=1",
    ],
}


@pytest.mark.parametrize("how", APART)
def test_engines_of_their_own_give_the_numbers_of_engines_inside(
    files, prepared, inside, tmp_path, how
):
    done = prepared.run(*files.argv(tmp_path / "run", STEPS, OWN, *APART[how]))
    assert done.returncode == 0, done.stderr
    metrics, weights = outcome(tmp_path / "run")
    buckets = "weight_sync/num_buckets"  # more of them, of the same bytes
    assert [{**line, buckets: 0} for line in metrics] == [
        {**line, buckets: 0} for line in inside[0]
    ]
    assert weights == inside[1]


def test_an_engine_of_two_ranks_is_killed_leaves_nothing_and_the_next_one_agrees_with_the_trainer(
    files, tmp_path
):
    """The check of agreement, in float32 within 1e-4, is what would end the run."""
    run_dir = tmp_path / "run"
    two_ranks = ["rollout.tensor_model_parallel_size=2", "rollout.max_engine_restarts=1"]
    steps = "trainer.total_training_steps=6"
    run = commands.start(*files.argv(run_dir, steps, OWN, *two_ranks))
    deadline, metrics = time.monotonic() + commands.LIMIT_S, run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (engine,) = [
        process
        for process in psutil.Process(run.pid).children(recursive=True)
        if "mcore_rl.launch.engine_process" in process.cmdline()
    ]
    ranks = engine.children(recursive=True)
    assert len([process for process in ranks if "Worker_TP" in process.name()]) == 2
    engine.kill()
    done = commands.finish(run)
    assert done.returncode == 0, done.stderr
    assert "engine and trainer agree" in done.stderr
    assert "it is started again, 0 more times at most" in done.stderr
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert alive == []
    worst = [
        line.get("mismatch/logprob_abs_diff/max", 0.0) for line in commands.read_metrics(run_dir)
    ]
    assert max(worst) < 1e-4


def faulty(files, prepared, run_dir: Path, fault: str, *overrides: str):
    """Return how a run of fake engines ends in which one fails once, and the seconds from then."""
    once = run_dir.with_suffix(".once")
    argv = files.argv(
        run_dir,
        "rollout.name=faulty",
        "rollout.logprob_tolerance=1000",
        OWN,
        STEPS,
        *overrides,
    )
    done = prepared.run(*argv, environment={**ENVIRONMENT, FAULT: fault, ONCE: str(once)})
    ended = time.monotonic()
    assert once.exists() == bool(fault), f"the fault did not happen:\n{done.stderr}"
    return done, ended - float(once.read_text()) if fault else 0.0


GENERATING = r"while generating \(engine \1, weights 1\)"
TAKING = r"while taking weights \(engine \1, weights 2\)"
# The engine draws from the first call on; which of the two is under way when it fails is a race.
GENERATE = r"\[role engine (\d), rollout\.(?:generate|answer), step 1\]"
RECEIVE = r"\[role engine (\d), engine_process\.receive_weights, step 1\]"
KILLED = "the process was ended by SIGKILL"
SILENT = r"sent no message for \d s \(process \d+, stopped\)"
FAULTS = {
    "SIGKILL generate 1": f"{GENERATE} {KILLED}, {GENERATING}",
    "SIGKILL update 2": f"{RECEIVE} {KILLED}, {TAKING}",
    "SIGSTOP generate 1": f"{GENERATE} {SILENT}, {GENERATING}",
    "SIGSTOP update 2": f"{RECEIVE} {SILENT}, {TAKING}",
    "garbage generate 1": r"\[role rollout\] the engine answered \d tokens of the weights .*, not "
    r"1, while generating \(engine \d, weights 1\)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_fails_ends_the_run_with_its_name_phase_and_version(
    files, prepared, tmp_path, fault
):
    done, seconds = faulty(files, prepared, tmp_path / "run", fault)
    assert done.returncode not in (0, 2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(f"error: {FAULTS[fault]}", line), line
    logger.warning("%s: %.1f s", fault, seconds)


@pytest.fixture(scope="module")
def faultless(files, prepared, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("engines") / "faultless"
    done, _ = faulty(files, prepared, run_dir, "")
    assert done.returncode == 0, done.stderr
    return outcome(run_dir)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_is_started_again_completes_the_step_with_the_same_samples(
    files, prepared, faultless, tmp_path, fault
):
    room = ROOM[:-1] if fault.startswith("SIGKILL") else ()
    done, _ = faulty(
        files, prepared, tmp_path / "run", fault, "rollout.max_engine_restarts=1", *room
    )
    assert done.returncode == 0, done.stderr
    assert "it is started again, 0 more times at most" in done.stderr
    assert outcome(tmp_path / "run") == faultless


def test_an_engine_that_lets_no_thread_run_for_a_while_is_not_taken_for_dead(
    files, prepared, faultless, tmp_path
):
    """It is not stopped, which is seen; so does a machine look that has more to do than it can."""
    done, _ = faulty(files, prepared, tmp_path / "run", "busy generate 1")
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "run") == faultless


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_engines_that_fail_again_and_again_are_named_within_seconds(files, prepared, tmp_path):
    numbers = {"SIGKILL": 10, "SIGSTOP": 5, "garbage": 5}
    counted = [(fault, number) for fault in FAULTS for number in range(numbers[fault.split()[0]])]
    for place, (fault, _) in zip(itertools.count(), counted, strict=False):
        done, seconds = faulty(files, prepared, tmp_path / str(place), fault)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert re.fullmatch(f"error: {FAULTS[fault]}", line), line
        logger.warning("%s: %.1f s", fault, seconds)
        assert seconds <= MOST_S
