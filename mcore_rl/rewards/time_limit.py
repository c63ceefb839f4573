"""A wall-clock limit on a block of Python code.

The limit is a signal, so it interrupts Python code (loops, sleeps, awaits) but not one long
call into C, such as a regular expression that backtracks forever; and only the main thread can set
it. Scoring in processes that can be killed would have neither limit.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from mcore_rl.errors import require


class TimeLimitExceeded(BaseException):
    """The block ran too long.

    Not an Exception, so that the code under the limit does not catch it with its own mistakes.
    """


def time_limit(limit_s: float | None, key: str) -> AbstractContextManager[None]:
    """Return a context that raises TimeLimitExceeded once its block has run `limit_s` seconds.

    A timer that was already running goes on afterwards with the time that it has left.

    Args:
        limit_s: seconds; None for no limit.
        key: config key of the limit, for messages.

    Raises:
        UserError: outside the main thread, where the limit would have no effect.
    """
    if limit_s is None:
        return contextlib.nullcontext()
    require(
        threading.current_thread() is threading.main_thread(),
        key,
        limit_s,
        "can be enforced in the main thread only",
        f"Set {key}=null for no limit.",
    )
    return _armed(limit_s)


@contextlib.contextmanager
def _armed(limit_s: float) -> Iterator[None]:
    def expire(signum: int, frame: object) -> None:
        raise TimeLimitExceeded(f"no result after {limit_s:g} s")

    start = time.monotonic()
    outer_handler = signal.signal(signal.SIGALRM, expire)
    outer_delay, outer_interval = signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer_handler)
        if outer_delay:
            left = max(outer_delay - (time.monotonic() - start), 1e-6)
            signal.setitimer(signal.ITIMER_REAL, left, outer_interval)
