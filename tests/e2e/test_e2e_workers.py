"""A worker of a real run is killed or stopped: the run ends at once and says which and where.

`pytest -m slow tests/e2e/test_e2e_workers.py -rP` does it 20 and 5 times and says in which
stage, and after how many seconds.
"""

from __future__ import annotations

import itertools
import logging
import random
import re
import time

import pytest

from tests.e2e import commands
from tests.e2e.stage_marks import KILL_AT, MARKED, WORKER, read_stages

logger = logging.getLogger(__name__)

STAGES = ("eval", "rollout", "old_logprobs", "train", "weight_sync", "checkpoint")
MOST_S = 10.0
"""From the signal to the end of the run."""
HANG_S = 20


def strike(files, run_dir, rank, signal, stage, delay, *overrides):
    """Return how a run of two workers ends in which one is sent a signal in a stage of its second
    step, and the seconds from the signal to the end."""
    argv = files.argv(
        run_dir,
        "trainer.logger=[stage_marks]",
        "trainer.save_freq=1",
        "trainer.test_freq=1",
        "trainer.n_gpus_per_node=2",
        "actor.megatron.expert_model_parallel_size=2",
        *overrides,
    )
    at = {KILL_AT: f"{stage} 2 {delay}", WORKER: f"{rank} {signal}"}
    done = commands.run(*argv, environment=MARKED | at)
    ended = time.monotonic()
    struck = [seconds for name, seconds in read_stages(run_dir) if name == "signal"]
    assert struck, f"the run ended before:\n{done.stderr}"
    return done, ended - struck[0]


def cases(num, seed):
    """Return (stage, rank, seconds into the stage) of strikes at every stage and rank in turn."""
    source = random.Random(seed)
    turns = itertools.product(STAGES, (0, 1))
    return [
        (stage, rank, source.random() * 0.05)
        for stage, rank in itertools.islice(itertools.cycle(turns), num)
    ]


@pytest.mark.parametrize(
    "num",
    [
        pytest.param(1, marks=pytest.mark.timeout(commands.TEST_LIMIT_S)),
        pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def test_a_worker_that_is_killed_at_any_stage_ends_the_run_with_its_name(files, tmp_path, num):
    for number, (stage, rank, delay) in enumerate(cases(num, seed=0)):
        done, seconds = strike(files, tmp_path / str(number), rank, "SIGKILL", stage, delay)
        assert done.returncode == 137, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        # Between two calls, as while rewards are computed, there is none to name.
        assert re.fullmatch(
            rf"error: \[role worker(, \w+\.\w+)?, rank {rank}, step 1\] "
            "the process was ended by SIGKILL",
            line,
        ), line
        logger.warning("%s, rank %d: %.1f s: %s", stage, rank, seconds, line)
        assert num == 1 or seconds <= MOST_S


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_worker_that_is_stopped_is_named_with_the_stacks_of_the_others(files, tmp_path):
    for number, (stage, rank, delay) in enumerate(cases(5, seed=1)):
        done, seconds = strike(
            files, tmp_path / str(number), rank, "SIGSTOP", stage, delay,
            f"trainer.hang_timeout_s={HANG_S}",
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert f"rank {rank}, step 1] no progress for {HANG_S} s" in line
        assert f"rank {rank} does not answer (process " in line
        assert "--- rank" in done.stderr
        logger.warning("%s, rank %d: %.1f s: %s", stage, rank, seconds, line)
        assert seconds <= HANG_S + MOST_S
