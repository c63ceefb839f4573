"""Sandboxes for tests: limits that leave time to spare, and both ways to store files."""

import functools
import textwrap

from mcore_rl.rewards import sandbox
from mcore_rl.rewards.base import SandboxConfig
from mcore_rl.rewards.sandbox import Sandbox

# So much CPU time that the other limits are always first; it has a test of its own.
LIMITS = SandboxConfig(cpu_s=30, memory_mib=256, file_mib=2, output_mib=1)
ENOUGH_S = 120.0
"""For programs that end by themselves, on a busy machine."""

SERVE_WITH = """
import sys
sys.path.append(sys.argv[1])
from mcore_rl.jail import confinement, server, storage
def refuse(*_):
    raise PermissionError("not on this system")
{}
server.main()
"""
ON_DISK = "storage._enter_name_spaces = refuse"


def run(program, stdin="", timeout_s=ENOUGH_S, limits=LIMITS):
    """Return the outcome of a program in a sandbox of its own."""
    with Sandbox(textwrap.dedent(program), limits) as box:
        return box.run_program(stdin, timeout_s)


@functools.cache
def has_name_spaces():
    """Whether this system gives programs a file system of their own."""
    program = "import os\nprint(os.path.ismount(os.getcwd()))"
    return run(program).output == "True\n"


def make_system_lack(monkeypatch, *lines):
    """Have sandboxes start on a system that lacks what the lines of code take away."""
    monkeypatch.setattr(sandbox, "_SERVE", SERVE_WITH.format("\n".join(lines)))
