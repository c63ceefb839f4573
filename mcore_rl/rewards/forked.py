"""Call a function in a forked copy of this process, so that neither hanging nor crashing matters.

For work on what a model wrote, in libraries that cannot be interrupted: the call is killed on time
even inside C code, and what it allocates is gone with it. Forking costs milliseconds and the copy
has every module loaded, but it is safe only where no other thread holds a lock: in a scoring
process, not in the controller.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Callable

from mcore_rl.rewards.child_process import die_with_parent


def call_forked(
    function: Callable[..., bool], *arguments: object, limit_s: float, memory_bytes: int
) -> bool | None:
    """Return `function(*arguments)`; None if it raises, dies, or takes longer than the limit.

    Args:
        function: its result is a truth value.
        arguments: of the function.
        limit_s: wall-clock seconds.
        memory_bytes: most private memory of the copy, this process's own included.
    """
    parent = os.getpid()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent(parent)
            resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
            os.write(writer, b"1" if function(*arguments) else b"0")
        finally:
            os._exit(0)  # neither handlers nor buffers of the parent may run twice
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], limit_s)
        answer = os.read(reader, 1) if ready else b""
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {b"1": True, b"0": False}.get(answer)
