"""The fast tests start no process: `make test-fast` leaves out those that say that they do."""

from __future__ import annotations

import multiprocessing.process
import os
import subprocess
from pathlib import Path

import pytest

MARKER = "starts_processes"
STARTS = (
    (subprocess.Popen, "__init__"),
    (multiprocessing.process.BaseProcess, "start"),
    (os, "fork"),
    (os, "posix_spawn"),
)
"""Every way in which Python starts a process ends in one of these."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Fail a test without the marker when it, or a fixture of it, starts a process."""
    # A run of several folders calls the hook for the tests of all of them.
    is_unit = item.path.is_relative_to(Path(__file__).parent)
    if item.get_closest_marker(MARKER) or not is_unit:
        return (yield)

    def refuse(*_, **__):
        pytest.fail(f"{item.nodeid} starts a process: mark it with pytest.mark.{MARKER}")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STARTS:
            patch.setattr(owner, name, refuse)
        return (yield)
