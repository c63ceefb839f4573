"""Two real processes under the launcher: commands, and every way in which a run can end early.

Each case starts three processes (the agent and two ranks), which takes three seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# A rank that waits for a dead one would wait for half an hour.
LIMIT_S = 120


ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(__file__).parent),
    "OMP_NUM_THREADS": "1",
    # As run_command sets it: without a resolver torch warns about host names on stderr.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def command(case: str) -> list[str]:
    return [sys.executable, "-m", "torchrun_programs", case]


def run(case: str) -> subprocess.CompletedProcess[str]:
    start = time.monotonic()
    done = subprocess.run(
        command(case), env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S + 60
    )
    assert time.monotonic() - start < LIMIT_S, "a rank waited for a dead one"
    return done


def error_lines(done) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


def test_commands_reach_every_rank_and_results_come_back_by_rank():
    done = run("works")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "common [(0, 'works', 'a', 1), (1, 'works', 'a', 1)]",
        "each [(0, 'works', 'b'), (1, 'works', 'c')]",
        "collective [1, 1]",
        "equal True",
    ]
    assert sorted(lines[4:]) == ["closed 0", "closed 1"]


def test_ranks_wait_for_their_start_longer_than_for_a_collective():
    """The controller may read data for hours before it starts the workers."""
    done = run("reads_long")
    assert done.returncode == 0, done.stderr
    assert "collective [1, 1]" in done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_fails_ends_the_run_with_rank_and_step_and_no_echo(rank):
    """The other rank, which loses its peer in a collective, adds nothing."""
    done = run(f"{rank}_error")
    assert done.returncode == 1
    assert error_lines(done) == [
        f"error: [role worker, fail_on, rank {rank}, step 5] KeyError: 'layer 7'"
    ]
    assert 'raise KeyError("layer 7")' in done.stderr  # the traceback
    assert done.stderr.count("KeyError: 'layer 7'") == 3
    assert "Connection" not in done.stderr


def test_a_run_error_keeps_its_kind_and_role_and_gains_rank_and_step():
    done = run("1_rollout")
    assert done.returncode == 1
    assert error_lines(done) == ["error: [role rollout, rank 1, step 5] the engine is gone"]
    assert "mcore_rl.errors.RolloutError" in done.stderr


def test_a_worker_that_is_killed_ends_the_run_with_the_shell_s_exit_code():
    done = run("1_killed")
    assert done.returncode == 137
    assert done.stderr == "error: [rank 1] the process was ended by SIGKILL\n"


def test_a_worker_that_cannot_start_ends_the_run():
    done = run("fail_at_start")
    assert done.returncode == 1
    assert error_lines(done) == ["error: [role worker, start, rank 1] OSError: no weights here"]


def test_a_failure_of_the_loop_is_the_controller_s():
    done = run("controller_fails")
    assert done.returncode == 1
    assert error_lines(done) == ["error: [role controller, rank 0] ZeroDivisionError: in the loop"]


def test_a_user_s_mistake_found_while_running_is_one_line_and_exit_code_2():
    done = run("user_error_while_running")
    assert done.returncode == 2
    assert done.stderr == "error: the reward of 'x' failed.\n"


def test_a_mistake_that_every_rank_finds_is_named_once():
    done = run("wrong_world_size")
    assert done.returncode == 2
    assert done.stderr == (
        "error: trainer.n_gpus_per_node * trainer.nnodes = 3, but 2 processes were launched. "
        "Make them agree.\n"
    )


def test_no_rank_outlives_a_launcher_that_was_killed():
    """It would go on writing the run folder beside the run that resumes it."""
    launcher = subprocess.Popen(command("wait"), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    pids = [int(launcher.stdout.readline()) for _ in range(2)]
    ranks = [psutil.Process(pid) for pid in pids]
    launcher.kill()
    launcher.wait()
    gone, alive = psutil.wait_procs(ranks, timeout=LIMIT_S)
    for process in alive:
        process.kill()
    assert len(gone) == 2
