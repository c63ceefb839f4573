"""Limits of what a process that scores may take.

They are the kernel's work, so they hold whatever the process computes; what it forks inherits them.
"""

from __future__ import annotations

import resource
from pathlib import Path


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
