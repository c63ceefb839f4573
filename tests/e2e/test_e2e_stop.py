"""SIGUSR1 to a real run: it saves, ends with exit code 0, and goes on to the numbers of a run that
was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import commands
from tests.e2e.stage_marks import KILL_AT, MARKED, WORKER

POINTER = Path("checkpoints") / "latest_checkpointed_iteration.txt"
# One engine of both workers, whose ranks must give up together: 44 tokens are nearly three times
# as many steps as they do between two questions.
LONG = (
    "rollout.tensor_model_parallel_size=2",
    "data.max_response_length=44",
    "rollout.logprob_tolerance=1e-3",
    "trainer.total_training_steps=3",
    "trainer.test_freq=2",
    "trainer.save_freq=100",
    "trainer.logger=[stage_marks,console]",
)


@pytest.fixture(scope="module")
def whole(files, prepared, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("stop") / "whole"
    done = prepared.run(*files.argv(run_dir, *LONG), environment=MARKED)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize(
    ("stage", "step"), [("rollout", 1), pytest.param("train", 2, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(commands.TEST_LIMIT_S)
def test_a_run_that_is_sent_sigusr1_saves_and_goes_on_to_the_same_numbers(
    files, prepared, whole, tmp_path, stage, step
):
    """In the second step: while it generates, what it began with is saved; while it trains, what it
    ends with."""
    run_dir = tmp_path / "run"
    asked = MARKED | {KILL_AT: f"{stage} 2 0", WORKER: "controller SIGUSR1"}
    stopped = prepared.run(*files.argv(run_dir, *LONG), environment=asked)
    assert stopped.returncode == 0, stopped.stderr
    assert "SIGUSR1: the run saves and ends" in stopped.stderr
    assert "ended as asked" in stopped.stderr
    assert (run_dir / POINTER).read_text() == str(step)
    assert len(commands.read_metrics(run_dir)) == step
    assert not (run_dir / "hf_model").exists()
    again = prepared.run(*files.argv(run_dir, *LONG), environment=MARKED)
    assert again.returncode == 0, again.stderr
    assert f"resumed from {run_dir}/checkpoints/global_step_{step}" in again.stderr
    assert commands.read_metrics(run_dir) == commands.read_metrics(whole)
    files_of = [commands.hash_files(run / "hf_model") for run in (run_dir, whole)]
    assert files_of[0] == files_of[1]
