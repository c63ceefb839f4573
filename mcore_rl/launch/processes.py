"""Worker processes as their launcher knows them: whether they live, and how to end them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

from mcore_rl.cluster.placement import EnginePlace, Placement
from mcore_rl.processes import ending, kill
from mcore_rl.sockets import Address

SECRET_VARIABLE = "MCORE_RL_CHANNEL_SECRET"
"""Environment of a worker: the channel's secret, as hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    exit_code: int | None
    """Negative: the signal that ended it; None: not known."""

    @property
    def text(self) -> str:
        """As part of a message: "was ended by SIGKILL"."""
        if self.exit_code is None:
            return "ended"
        if self.exit_code < 0:
            return f"was ended by {ending(self.exit_code)}"
        return f"ended with {ending(self.exit_code)}"


class Processes(Protocol):
    """The processes of a run: train workers, and after them the engines that are processes of their
    own."""

    placement: Placement

    def ended(self) -> Mapping[int, Ended]:
        """Return the ranks that are known to have ended, and how."""
        ...

    def state(self, rank: int) -> str:
        """Return what is known of a process that does not answer: "process 77, stopped"."""
        ...

    def kill_one(self, rank: int) -> None:
        """Kill the process of an engine, and wait until it is gone."""
        ...

    def restart(self, engine: EnginePlace) -> None:
        """Start another process in the place of an engine's that is gone."""
        ...

    def update_address(self, engine: EnginePlace) -> Address:
        """Return where an engine takes its weights."""
        ...

    def wait(self, seconds: float) -> bool:
        """Wait for the end of all processes; return whether it came in time."""
        ...

    def kill(self) -> None:
        """End all processes at once, and remove what they leave."""
        ...


class Children:
    """Processes that this process starts on this machine.

    They end with it, however it ends: each asks the system for a signal at the end of the thread
    that started it, so they must be started by the main thread.

    Args:
        address: of the controller.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(
        self,
        rank: int,
        module: ModuleType,
        environment: Mapping[str, str],
        options: Mapping[str, object],
    ) -> None:
        """Start the process of a rank, in place of one that has ended.

        Args:
            rank: by which the controller reaches it.
            module: to run.
            environment: added to this process's.
            options: of the module's command line, beside where the controller is.
        """
        assert module.__spec__ is not None
        command = [sys.executable, "-m", module.__spec__.name]
        named = {"endpoint": self._address.endpoint, "parent": os.getpid(), **options}
        for name, value in named.items():
            command += [f"--{name}", str(value)]
        self._processes[rank] = subprocess.Popen(
            command,
            env=os.environ | dict(environment) | {SECRET_VARIABLE: self._address.secret.hex()},
            stdin=subprocess.DEVNULL,
        )

    def kill_one(self, rank: int) -> None:
        """See `Processes`."""
        kill([self._processes[rank]])

    def ended(self) -> dict[int, Ended]:
        """See `Processes`."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: Ended(code) for rank, code in codes.items() if code is not None}

    def state(self, rank: int) -> str:
        """See `Processes`."""
        if rank not in self._processes:
            return "another machine's"
        return process_state(self._processes[rank].pid)

    def wait(self, seconds: float) -> bool:
        """See `Processes`."""
        deadline = time.monotonic() + seconds
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
        return True

    def kill(self) -> None:
        """See `Processes`."""
        kill(self._processes.values())


def process_state(pid: int) -> str:
    """Return number and state of a process of this machine: "process 77, stopped"."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return f"process {pid}"
    line = next((line for line in status.splitlines() if line.startswith("State:")), "")
    return f"process {pid}, {line.partition('(')[2].rstrip(')') or 'in an unknown state'}"
