"""Commands that need not import their libraries: `prepared.run(*argv)` in place of `commands.run`.

Nearly all of the time that a small run takes goes into importing torch, Megatron-Core, vLLM and
transformers, in the controller and in every worker. A process that has imported them once, and has
no threads and no engine, forks for each command, and each command for its workers; from `main()` on
they do what they always do.

Not tested like this is how an interpreter starts them, and what they import in which order. So each
command has tests that start it as a user does, by `commands.run`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tests.e2e import commands


class Forked:
    """A command that the prepared process runs, as `subprocess.Popen` has it."""

    def __init__(self, args: Sequence[str], connection: Connection, folder: Path) -> None:
        self.args, self._connection, self._folder = args, connection, folder
        self.pid: int = connection.recv()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(0)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        if self._wait(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        stdout, stderr = ((self._folder / name).read_text() for name in ("stdout", "stderr"))
        return stdout, stderr

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None and self._connection.poll(timeout):
            self.returncode = self._connection.recv()
        return self.returncode


class PreparedProcess:
    """A process that forks commands; started when the first one is asked for.

    Args:
        hub: HF_HOME of all commands, which the hub's library reads when it is imported.
    """

    def __init__(self, hub: Path) -> None:
        self.hub = hub
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._last: Forked | None = None
        self._folders = tempfile.TemporaryDirectory(prefix="prepared-")

    def run(
        self,
        *argv: str,
        module: str = "mcore_rl.train",
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """See `commands.run`."""
        return commands.finish(self.start(*argv, module=module, environment=environment))

    def start(
        self,
        *argv: str,
        module: str = "mcore_rl.train",
        environment: Mapping[str, str] | None = None,
    ) -> Forked:
        """See `commands.start`."""
        if self._last is not None and self._last.poll() is None:  # its test has failed
            commands.kill_all(self._last)
        connection = self._connection or self._start()
        folder = Path(tempfile.mkdtemp(dir=self._folders.name))
        args = [module, *argv]
        files = {name: str(folder / name) for name in ("stdout", "stderr")}
        in_it = {"HF_HOME": str(self.hub)} | dict(environment or {})
        asked = {"argv": args, "environment": commands.ENVIRONMENT | in_it}
        connection.send(asked | files)
        self._last = Forked(args, connection, folder)
        return self._last

    def close(self) -> None:
        if self._last is not None and self._last.poll() is None:
            commands.kill_all(self._last)
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.wait(commands.LIMIT_S)
        self._folders.cleanup()

    def _start(self) -> Connection:
        self._connection, theirs = multiprocessing.Pipe()
        number = theirs.fileno()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "prepared_process.py"), str(number)],
            env=commands.ENVIRONMENT | {"HF_HOME": str(self.hub)},
            stdin=subprocess.DEVNULL,
            pass_fds=[number],
        )
        theirs.close()
        return self._connection
