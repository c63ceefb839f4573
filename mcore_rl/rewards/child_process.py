"""What a process that scores does first: it dies with its parent, and limits what it takes.

All of it is the kernel's work from then on, so it holds whatever the process computes and however
its parent ends. What it forks inherits the limits but not the death: every child asks for its own.
The sandbox's program does so itself (`jail.py`), since it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    Args:
        parent: number of that thread's process, taken before this one could be orphaned.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def limit_memory(most_bytes: int) -> None:
    """Limit the private memory of this process to `most_bytes`, or to less if it has less already.

    Only a privileged process may raise its limits.
    """
    _limit(resource.RLIMIT_DATA, most_bytes)


def private_memory() -> int:
    """Return the bytes of private memory of this process, as `limit_memory` counts them."""
    return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()


def limit_cpu(seconds: int) -> None:
    """Have the kernel end this process after so much CPU time, or less if it has less already."""
    _limit(resource.RLIMIT_CPU, seconds)


def _limit(kind: int, most: int) -> None:
    present = resource.getrlimit(kind)
    most = min([most, *(limit for limit in present if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(kind, (most, most))
