"""A real controller with two real workers: calls, and every way in which a run can end early."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

# A process that waited for a dead one would wait for an hour.
LIMIT_S = 200
_PATHS = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(_PATHS),
    "MCORE_RL_PLUGINS": "launch_programs",
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
LAUNCHERS = ["local", "torchrun"]
pytestmark = [pytest.mark.starts_processes, pytest.mark.timeout(2 * LIMIT_S)]


def command(case: str, launcher: str = "local", hang_timeout_s: float = 600) -> list[str]:
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]
    module = [*torchrun, "launch_programs"] if launcher == "torchrun" else ["launch_programs"]
    return [sys.executable, "-m", *module, case, str(hang_timeout_s)]


def run(case: str, *how, folder: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | ({"TMPDIR": folder} if folder else {})
    return subprocess.run(
        command(case, *how), env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )


def start(case: str, folder: str | None = None) -> subprocess.Popen[str]:
    """Start a case that says "up" when all workers are."""
    process = subprocess.Popen(
        command(case),
        env=ENVIRONMENT | ({"TMPDIR": folder} if folder else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def workers_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Return the workers that a controller has started, by rank."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children}


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_calls_reach_the_ranks_that_are_asked_and_results_come_back_by_rank(launcher):
    done = run("works", launcher)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "common [(0, 'works', 'a', 1), (1, 'works', 'a', 1)]",
        "each {1: (1, 'works', 'to 1'), 0: (0, 'works', 'to 0')}",
        "one {1: (1, 'works')}",
        "collective [1, 1]",
    ]
    assert sorted(lines[4:]) == ["closed 0", "closed 1"]


def test_a_local_run_leaves_nothing_in_the_temporary_folder():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the path of a socket is short
        assert run("works", folder=folder).returncode == 0
        assert os.listdir(folder) == []
        assert run("1_error", folder=folder).returncode == 1
        assert os.listdir(folder) == []


def test_what_a_killed_run_leaves_there_goes_with_the_next_one():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        process = start("idle", folder)
        process.kill()
        process.communicate()
        assert len(os.listdir(folder)) == 1
        assert run("mistake", folder=folder).returncode == 2
        assert os.listdir(folder) == []


def test_arrays_of_all_sizes_come_back_as_they_went():
    done = run("arrays")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "equal"), done.stderr


def test_a_call_that_is_cancelled_before_it_has_begun_is_not_done():
    done = run("cancel")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["cancelled True", "1 (1, 'cancel', 'after')"]


@pytest.mark.parametrize(("rank", "launcher"), [(0, "local"), (1, "local"), (1, "torchrun")])
def test_a_worker_that_fails_ends_the_run_with_rank_and_step_and_no_echo(rank, launcher):
    """The other rank, which waits for its peer in a collective, adds nothing."""
    done = run(f"{rank}_error", launcher)
    assert done.returncode == 1
    assert error_lines(done.stderr) == [
        f"error: [role worker, probe.fail, rank {rank}, step 5] KeyError: 'layer 7'"
    ]
    assert 'raise KeyError("layer 7")' in done.stderr  # the worker's traceback
    assert "call_all(workers, Probe.fail" in done.stderr  # the controller's
    assert "Connection" not in done.stderr


def test_a_run_error_keeps_its_kind_and_role_and_gains_rank_and_step():
    done = run("1_rollout")
    assert done.returncode == 1
    assert error_lines(done.stderr) == ["error: [role rollout, rank 1, step 5] the engine is gone"]
    assert "mcore_rl.errors.RolloutError" in done.stderr


def test_a_worker_that_dies_is_named_with_its_signal_and_no_echo_of_the_others():
    done = run("1_killed")
    assert done.returncode == 137
    assert done.stderr == (
        "error: [role worker, probe.fail, rank 1, step 5] the process was ended by SIGKILL\n"
    )


def test_a_worker_that_dies_under_torchrun_is_named():
    done = run("1_killed", "torchrun")
    assert done.returncode == 1  # torchrun's, whatever its processes return
    (line,) = error_lines(done.stderr)
    # The end of the process and that of its connection are both seen, in either order.
    where = "error: [role worker, probe.fail, rank 1, step 5] "
    assert line in (f"{where}the process ended", f"{where}cannot be reached any more")


def test_a_worker_that_dies_while_the_controller_does_something_else_ends_the_run():
    process = start("idle")  # which would take ten minutes
    workers_of(process)[1].kill()
    _, stderr = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 137
    assert error_lines(stderr) == [
        "error: [role worker, rank 1, step 5] the process was ended by SIGKILL"
    ]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_worker_that_stops_is_named_with_the_stacks_of_all_others(launcher):
    done = run("1_stopped", launcher, 5)
    assert done.returncode == (3 if launcher == "local" else 1)
    (line,) = error_lines(done.stderr)
    assert re.fullmatch(
        r"error: \[role worker, probe\.fail, rank 1, step 5\] no progress for 5 s while waiting "
        r"for probe\.fail of ranks 0, 1; rank 1 does not answer \(process \d+, stopped\) "
        r"\(trainer\.hang_timeout_s\)",
        line,
    )
    stacks = done.stderr[done.stderr.index("--- rank 0 ---") : done.stderr.index("--- rank 1 ---")]
    assert "dist.barrier()" in stacks


def test_a_long_wait_says_what_it_waits_for():
    done = run("reminds")
    assert done.returncode == 0, done.stderr
    reminders = re.findall(r"waiting for (.*): no progress for (\d) s", done.stderr)
    assert len(reminders) >= 2
    assert {what for what, _ in reminders} == {"probe.wait of ranks 1"}
    assert [int(seconds) for _, seconds in reminders] == sorted(int(s) for _, s in reminders)


def test_a_worker_that_cannot_start_ends_the_run():
    done = run("fail_at_start")
    assert done.returncode == 1
    assert error_lines(done.stderr) == [
        "error: [role worker, start, rank 1] OSError: no weights here"
    ]


def test_a_failure_that_the_installation_explains_names_the_doctors_line():
    """The seam of all commands that start workers: the last words of the controller."""
    done = run("lack_at_start")
    assert done.returncode == 1
    assert error_lines(done.stderr) == [
        "error: [role worker, start, rank 1] RuntimeError: operator torchvision::nms does not exist"
        "; mcore-rl doctor torchvision says more"
    ]


def test_a_port_that_is_taken_names_the_doctors_line():
    """Rank 0 as Slurm starts it, without an agent of torchrun that hosts the store."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        done = subprocess.run(
            command("works"),
            env=ENVIRONMENT | where | ranks,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    assert done.returncode == 1
    (line,) = error_lines(done.stderr)
    assert "EADDRINUSE" in line
    assert line.endswith("; mcore-rl doctor port says more")


def test_a_failure_of_the_loop_is_the_controller_s():
    done = run("controller_fails")
    assert done.returncode == 1
    assert error_lines(done.stderr) == ["error: [role controller] ZeroDivisionError: in the loop"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("mistake", "error: the data is not there."),
        ("1_user", "error: the reward of 'x' failed."),
    ],
)
def test_a_user_s_mistake_is_one_line_and_exit_code_2(case, line, launcher):
    done = run(case, launcher)
    assert done.returncode == (2 if launcher == "local" else 1)
    assert error_lines(done.stderr) == [line]


def test_another_number_of_processes_than_configured_is_named_once():
    done = run("size", "torchrun")
    assert error_lines(done.stderr) == [
        "error: trainer.n_gpus_per_node * trainer.nnodes=3 does not fit the 2 processes that were "
        "launched. Make them agree."
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_a_controller_that_was_ended(number):
    """It would go on writing the run folder beside the run that resumes it."""
    process = start("waits")
    workers = list(workers_of(process).values())
    assert len(workers) == 2
    process.send_signal(number)
    process.communicate(timeout=LIMIT_S)
    gone, alive = psutil.wait_procs(workers, timeout=LIMIT_S)
    for worker in alive:
        worker.kill()
    assert len(gone) == 2


def test_workers_ignore_what_a_terminal_sends_to_all_of_its_processes():
    process = start("idle")
    workers = workers_of(process).values()
    for worker in workers:
        worker.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert [worker.status() for worker in workers] == [psutil.STATUS_SLEEPING] * 2
    assert process.poll() is None
    process.kill()
    process.communicate()


def own_address() -> str:
    """Return an address of this machine that other machines would use."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of the range for documentation; nothing is sent
        except OSError:
            pytest.skip("this machine has no network: there is no address but loopback")
        return probe.getsockname()[0]


def free_port(address: str) -> int:
    """Return a port that nothing has, below those that the system gives to whoever asks: another
    test's process would have it by the time that torchrun asks for it."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return port
    raise AssertionError("no port is free")


@pytest.mark.parametrize("secret", ["environment", "home"])
def test_between_nodes_calls_go_over_an_encrypted_connection(secret, tmp_path):
    """Two agents of one process each, as on two nodes of one network."""
    address, environment = own_address(), ENVIRONMENT | {"HOME": str(tmp_path)}
    if secret == "environment":
        environment |= {"MCORE_RL_CHANNEL_SECRET": "07" * 32}
    port = free_port(address)
    nodes = [
        subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nnodes=2",
                    "--nproc-per-node=1",
                ),
                *(f"--node-rank={node}", f"--master-addr={address}", f"--master-port={port}"),
                *("-m", "launch_programs", "works", "600"),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=LIMIT_S) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "collective [1, 1]" in outputs[0][0]
    assert (tmp_path / ".mcore_rl" / "channel_secret").exists() == (secret == "home")
