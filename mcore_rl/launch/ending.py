"""How a run ends: in order, or with a report of its error.

The report is one line, and a traceback where the error is not the user's mistake. It is printed
before the workers are ended: torchrun ends all its processes as soon as one of them has ended.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from mcore_rl.doctor.symptoms import hint
from mcore_rl.errors import USER_ERROR_EXIT_CODE, RunError, UserError, WorkerLostError
from mcore_rl.launch.group import ChannelWorkers, GiveUp
from mcore_rl.printable import printable


def run_with_workers(
    open_workers: Callable[[GiveUp], ChannelWorkers],
    program: Callable[[ChannelWorkers], None],
    failure_grace_s: float,
) -> None:
    """Open worker processes and run the program with them; none of them outlives it.

    A signal to end (SIGINT, SIGTERM) ends the workers and then this process.

    Args:
        open_workers: starts them.
        program: runs with them.
        failure_grace_s: seconds. A signal to end may come because a worker has failed: torchrun
            sends it to all. Whether that is so is known within this time, and is reported then.
    """

    def end(number: int, _: Any) -> NoReturn:
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    workers = open_workers(end_process)
    try:
        program(workers)
    except SystemExit:
        if (failure := workers.failure_within(failure_grace_s)) is not None:
            end_process(failure, workers.kill)
        workers.kill()
        raise
    except BaseException as error:  # noqa: BLE001  after any error, no process may stay
        end_process(error, workers.kill)


def end_process(error: BaseException, end_workers: Callable[[], None] = lambda: None) -> NoReturn:
    """Say what went wrong, end the workers and this process, with the exit code of the error.

    This happens at once: an orderly shutdown would wait for threads that wait for the failed part.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, signal.SIG_IGN)
    code, trace = 1, ""
    if isinstance(error, UserError):
        code = USER_ERROR_EXIT_CODE
    else:
        if not isinstance(error, WorkerLostError):  # its line says all
            trace = "".join(traceback.format_exception(error))
        if not isinstance(error, RunError):
            error = RunError(f"{type(error).__name__}: {error}", role="controller")
        code = error.exit_code
    line = str(error).replace("\n", "\\n")  # a name from the user may contain one
    if isinstance(error, RunError) and error.step is None:  # nothing has been trained yet
        line += hint(line)
    sys.stderr.write(printable(f"{trace}error: {line}\n"))
    sys.stderr.flush()
    sys.stdout.flush()
    end_workers()
    os._exit(code)
