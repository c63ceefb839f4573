"""Processes that are started by others: their end, and its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mcore_rl.processes import ending, kill


@pytest.mark.starts_processes
def test_a_process_that_is_orphaned_before_it_asks_to_die_with_its_parent_ends():
    program = "from mcore_rl.processes import die_with_parent; die_with_parent(0)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL


@pytest.mark.starts_processes
def test_killing_waits_until_all_are_gone():
    processes = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) for _ in range(2)]
    kill(processes)
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-signal.SIGKILL, "SIGKILL"),
        (-(signal.SIGRTMIN + 3), f"signal {signal.SIGRTMIN + 3}"),
    ],
)
def test_how_a_process_ended_has_a_name(code, text):
    assert ending(code) == text


@pytest.mark.starts_processes
def test_a_scoring_process_that_is_orphaned_before_it_begins_ends():
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "mcore_rl.rewards.worker", str(reader), "0"]
    done = subprocess.run(command, pass_fds=[reader], timeout=120)
    os.close(reader)
    os.close(writer)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.starts_processes
def test_a_process_may_open_as_many_files_as_the_system_allows():
    program = (
        "import resource\n"
        "_, most = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))\n"
        "from mcore_rl.processes import raise_file_limit\n"
        "raise_file_limit()\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
