"""However a command ends, it has ended, and one line says why. `timeit` runs the statements."""

from __future__ import annotations

import os

import psutil
import pytest

from mcore_rl.verify.processes import run_module

pytestmark = pytest.mark.starts_processes


@pytest.mark.parametrize(
    ("statement", "exit_code", "reason"),
    [
        ("pass", 0, None),
        ("1 / 0", 1, "exit code 1"),
        ("import os; os.kill(os.getpid(), 9)", -9, "ended by SIGKILL"),
        ("print('x\\nerror: why\\nerror: echo'); 1 / 0", 1, "why"),
    ],
)
def test_a_command_that_ends_by_itself_says_why(tmp_path, statement, exit_code, reason):
    ended = run_module("timeit", ["-n1", "-r1", statement], tmp_path / "log.txt", 60)
    assert ended.exit_code == exit_code
    if reason is not None:
        assert ended.reason == reason


def test_a_command_that_hangs_is_ended(tmp_path):
    statement = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    # Long enough that it has started and said its number, on a busy machine.
    ended = run_module("timeit", ["-n1", "-r1", statement], tmp_path / "log.txt", 30)
    assert (ended.exit_code, ended.reason) == (None, "did not end in time")
    assert not psutil.pid_exists(int(ended.log))
    assert int(ended.log) != os.getpid()
