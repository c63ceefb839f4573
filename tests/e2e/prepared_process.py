"""Runs commands as forks of this process, which has imported their libraries; see `prepared.py`.

Takes {"argv", "environment", "stdout", "stderr"} from the connection whose descriptor is its
argument, the last two names of files, and answers with the number of the command's process, then
with its exit code. One command runs at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import logging
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Collection, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import NoReturn

from mcore_rl.launch.libraries import quiet_libraries

MODULES = ("mcore_rl.", "agreement_run")
"""What commands and workers may be: the package, and the program of a test."""
LIBRARIES = (
    "mcore_rl.workers.worker",
    "mcore_rl.rollout.vllm_engine",
    "vllm.entrypoints.llm",
    "vllm.v1.worker.cpu_worker",
    "mcore_rl.launch.worker_process",
    "mcore_rl.train",
    "mcore_rl.loop.on_policy",
    "mcore_rl.run.folder",
    "mcore_rl.run.inputs",
    "mcore_rl.observability.report.page",
)

_set_by_libraries: dict[str, str] = {}
"""What they have put into the environment."""
_left: list[logging.Handler] = []
"""Of the process that was forked."""


class ForkingPopen(subprocess.Popen):
    """Starts `python -m` with one of MODULES as a fork of this process.

    It takes the place of `subprocess.Popen`, so that a command starts its workers like this too.
    """

    def __init__(self, args, *, env=None, pass_fds=(), **how):
        if list(args[:2]) == [sys.executable, "-m"] and args[2].startswith(MODULES):
            environment = dict(os.environ if env is None else env)
            # Called in the fork in place of what is executed there: it does not return.
            how["restore_signals"] = False  # for an interpreter, which ignores some of them again
            how["preexec_fn"] = lambda: _be_command(args[2], args[3:], environment, pass_fds)
        super().__init__(args, env=env, pass_fds=pass_fds, **how)


def _be_command(
    module: str, argv: Sequence[str], environment: Mapping[str, str], kept: Collection[int]
) -> NoReturn:
    """Be `python -m module argv` from here on, with nothing of the process that was forked but
    what it has imported."""
    # Log handlers, too; kept, since what is freed would close descriptors that are others' by then.
    _left.extend(logging.root.handlers)
    logging.root.handlers.clear()
    logging._handlerList.clear()  # pyright: ignore[reportAttributeAccessIssue]
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):  # that of the list itself is closed already
                os.close(descriptor)
    # As an interpreter starts; `Popen` turns the collector off in a fork.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.enable()
    # The folders and processes of the one that was forked are not this one's to end.
    registry = weakref.finalize._registry  # pyright: ignore[reportAttributeAccessIssue]
    for left in list(registry):
        left.detach()
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    os.environ.clear()
    os.environ.update(_set_by_libraries | dict(environment))
    sys.argv = [module, *argv]
    code = 0
    try:
        found = importlib.import_module(module)
        if hasattr(found, "__path__"):  # a package
            found = importlib.import_module(f"{module}.__main__")
        found.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # noqa: BLE001  whatever it is, the interpreter says it so
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _import_libraries() -> None:
    before = dict(os.environ)
    quiet_libraries()
    for name in LIBRARIES:
        importlib.import_module(name)
    for name, value in os.environ.items():
        if before.get(name) != value:
            _set_by_libraries[name] = value
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork has the locks of other threads and not the threads"
    gc.collect()
    gc.freeze()  # a collection in a fork copies no pages of what is here already


def main() -> None:
    """Run commands until the other end is closed."""
    connection = Connection(int(sys.argv[1]))
    _import_libraries()
    subprocess.__dict__["Popen"] = ForkingPopen
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        with open(asked["stdout"], "w") as stdout, open(asked["stderr"], "w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", *asked["argv"]],
                env=asked["environment"],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        connection.send(process.pid)
        connection.send(process.wait())


if __name__ == "__main__":
    main()
