"""What a process that scores does first: it asks the kernel to end it with its parent.

What it forks does not inherit that: every child asks for its own. The sandbox's program does so
itself (`jail.py`), since it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal

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
