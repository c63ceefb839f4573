"""Whether what this process generates is still wanted.

The run may be asked to end while engines generate: the channel's thread says so beside the work,
and an engine asks between two steps. It is never wanted again.
"""

from __future__ import annotations

import threading

_is_asked = threading.Event()


def ask() -> None:
    """Have the engine of this process give up what it generates, from now on."""
    _is_asked.set()


def is_asked() -> bool:
    """Return whether that was asked."""
    return _is_asked.is_set()
