"""Worker processes as their launcher knows them: whether they live, and how to end them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mcore_rl.launch.channel import Address
from mcore_rl.processes import ending, kill

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
    """The worker processes of a run."""

    world_size: int

    def ended(self) -> Mapping[int, Ended]:
        """Return the ranks that are known to have ended, and how."""
        ...

    def state(self, rank: int) -> str:
        """Return what is known of a process that does not answer: "process 77, stopped"."""
        ...

    def wait(self, seconds: float) -> bool:
        """Wait for the end of all processes; return whether it came in time."""
        ...

    def kill(self) -> None:
        """End all processes at once, and remove what they leave."""
        ...


class Children:
    """Worker processes that this process starts on this machine.

    They end with it, however it ends: each asks the system for a signal at the end of the thread
    that started it, so this must be made by the main thread.

    Args:
        ranks: of the workers to start.
        address: of the controller.
        store: for `--store`: the file in which all workers meet; "": torchrun's store.
        engine: name of the rollout engine, whose library is imported meanwhile; "": none.
        environment: added to this process's.
    """

    def __init__(
        self,
        ranks: range,
        address: Address,
        store: str,
        engine: str,
        environment: Mapping[str, str],
    ) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in ranks:
            command = [sys.executable, "-m", "mcore_rl.launch.worker_process"]
            command += ["--endpoint", address.endpoint, "--parent", str(os.getpid())]
            command += ["--store", store, "--engine", engine]
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank - ranks.start)}
            secret = {SECRET_VARIABLE: address.secret.hex()}
            self._processes[rank] = subprocess.Popen(
                command,
                env=os.environ | dict(environment) | own | secret,
                stdin=subprocess.DEVNULL,
            )

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
