"""Processes that another one starts: they end with it, are killed, and how they ended has a name.

The sandbox does the same by itself (`jail/`), since it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Collection

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when the thread that started it ends, however it ends.

    A process that this one starts asks for itself.

    Args:
        parent: number of that thread's process, taken before this one could be orphaned.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def kill(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Kill processes that this one started, and wait until all of them are gone."""
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def ending(exit_code: int) -> str:
    """Return how a process ended: "SIGKILL" for -9, "exit code 3" for 3."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:  # a real-time signal
        return f"signal {-exit_code}"


def raise_file_limit() -> None:
    """Let this process and those that it starts open as many files as the system allows: sockets to
    many ranks, tensors passed between processes and files of checkpoints are files too."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def collective_backend(device_type: str) -> str:
    """Return the backend of the default process group for such devices ("cuda", "cpu"). Every group
    that Megatron makes has the same backend: with gloo in addition to NCCL each would have a mesh
    of sockets of its own. Host tensors use the gloo groups of `megatron/parallel.py`.
    """
    return "nccl" if device_type == "cuda" else "gloo"
