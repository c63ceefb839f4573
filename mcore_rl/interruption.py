"""Whether the generation of this process is still wanted.

The run may be asked to end while engines generate: the channel's thread records it during the work,
and an engine checks it between two steps. It is never reset.
"""

from __future__ import annotations

import threading

_is_asked = threading.Event()


def ask() -> None:
    """Make the engine of this process abort its generation, from now on."""
    _is_asked.set()


def is_asked() -> bool:
    """Return whether that was asked."""
    return _is_asked.is_set()
