"""Call a function in a forked copy of this process, so that hangs and crashes do no harm.

For work on what a model wrote, in libraries that cannot be interrupted: the call is killed on time
even inside C code, and what it allocates is gone with it. Forking costs milliseconds and the copy
has every module loaded, but it is safe only where no other thread holds a lock: in a scoring
process, not in the controller.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable

from mcore_rl.errors import RunError
from mcore_rl.processes import die_with_parent
from mcore_rl.rewards.limits import limit_cpu, limit_memory, private_memory


def call_forked(
    function: Callable[..., bool],
    *arguments: object,
    cpu_s: int,
    limit_s: float,
    memory_bytes: int,
) -> bool | None:
    """Return `function(*arguments)`; None if it raises, dies, or takes longer than the limit.

    Args:
        function: its result is a truth value.
        arguments: of the function.
        cpu_s: seconds of CPU time, which do not depend on how busy the machine is.
        limit_s: wall-clock seconds, several times `cpu_s`.
        memory_bytes: most private memory that the call may take, beyond what this process has
            taken; a lower limit of this process holds instead.

    Raises:
        RunError: if the copy cannot be made ready, so that the function was not called.
    """
    parent = os.getpid()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                die_with_parent(parent)
                limit_cpu(cpu_s)
                limit_memory(private_memory() + memory_bytes)
            except Exception as error:  # noqa: BLE001  whatever it is, the parent raises it
                os.write(writer, repr(error).encode())
            else:
                os.write(writer, b"1" if function(*arguments) else b"0")
        finally:
            os._exit(0)  # neither handlers nor buffers of the parent may run twice
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], limit_s)
        answer = os.read(reader, select.PIPE_BUF) if ready else b""
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    outcomes = {b"1": True, b"0": False, b"": None}
    if answer not in outcomes:
        raise RunError(f"a forked process was not made ready: {answer.decode()}", role="reward")
    return outcomes[answer]
