"""Worker processes as their launcher sees them: whether they run, and how to end them."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mcore_rl.cluster.placement import EnginePlace, Placement
from mcore_rl.processes import die_with_parent, ending, kill
from mcore_rl.sockets import Address, address_towards, interface_of

SECRET_VARIABLE = "MCORE_RL_CHANNEL_SECRET"
"""Environment variable of a worker: the channel's secret, as hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    exit_code: int | None
    """Negative: minus the number of the signal that ended it; None: not known."""
    reason: str = ""
    """Why it ended, where that is known."""

    @property
    def text(self) -> str:
        """As part of a message: "was ended by SIGKILL"."""
        if self.exit_code is None:
            return f"ended: {self.reason}" if self.reason else "ended"
        if self.exit_code < 0:
            return f"was ended by {ending(self.exit_code)}"
        return f"ended with {ending(self.exit_code)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A process to start, on any machine."""

    rank: int
    """The rank under which the controller reaches it."""
    main: Callable[[], None]
    """The main function of a module that `python -m` runs."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Options of its command line, in addition to the controller's address."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables added to the environment of the process that starts it."""
    devices: Sequence[int] | None = None
    """Devices that it sees, among those of the process that starts it; None: all."""
    attempt: int = 0
    """How many times a process of this rank was started before."""


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a process."""

    text: str
    """"process 77, stopped"."""
    is_stopped: bool = False
    """Whether it is known to be stopped, by a signal or a debugger."""


class Processes(Protocol):
    """The processes of a run, in this order: train workers, engines that are processes of their
    own, and nodes: processes that start others on machines without the controller."""

    placement: Placement
    nodes: Sequence[int]
    """Numbers of the machines that have a node process, in the order of its ranks."""

    def heard(self, report: Mapping[str, Any]) -> None:
        """Read the content of a heartbeat."""
        ...

    def is_remote(self, rank: int) -> bool:
        """Whether a process is reached over a network."""
        ...

    def ended(self) -> Mapping[int, Ended]:
        """Return the ranks that are known to have ended, and how."""
        ...

    def state(self, rank: int) -> State:
        """Return what is known of a process that does not answer."""
        ...

    def kill_one(self, rank: int) -> None:
        """Kill the process of an engine, and wait until it is gone."""
        ...

    def restart(self, engine: EnginePlace) -> None:
        """Start a new process for an engine whose process is gone."""
        ...

    def wait(self, seconds: float) -> bool:
        """Wait until all processes have ended; return whether they did in time."""
        ...

    def kill(self) -> None:
        """End all processes at once, and remove what they leave."""
        ...


class Children:
    """Processes that this process starts on this machine.

    They end with it, however it ends: each child asks the system for a signal when the thread that
    started it ends. So the main thread must start them.

    Args:
        address: of the controller.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._attempts: dict[int, int] = {}

    def start(self, program: Program) -> None:
        """Start a process; it replaces one of the same rank that has ended."""
        command = [sys.executable, "-m", program.main.__module__]
        named = {
            "endpoint": self._address.endpoint,
            "parent": os.getpid(),
            "rank": program.rank,
            **program.options,
        }
        for name, value in named.items():
            command += [f"--{name}", str(value)]
        environment = os.environ | network_environment(self._address) | dict(program.environment)
        if program.devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = visible_devices(program.devices)
        environment[SECRET_VARIABLE] = self._address.secret.hex()
        self._processes[program.rank] = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL
        )
        self._attempts[program.rank] = program.attempt

    def report(self) -> Mapping[str, Any]:
        """Return for each process: the attempt of its rank, its process id and how it ended."""
        states = {
            str(rank): [self._attempts.get(rank, 0), process.pid, process.poll()]
            for rank, process in list(self._processes.items())
        }
        return {"children": states}

    def kill_one(self, rank: int) -> None:
        """See `Processes`."""
        kill([self._processes[rank]])

    def ended(self) -> dict[int, Ended]:
        """See `Processes`."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: Ended(code) for rank, code in codes.items() if code is not None}

    def __contains__(self, rank: int) -> bool:
        return rank in self._processes

    def state(self, rank: int) -> State:
        """See `Processes`."""
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


def started_child(**options: type) -> tuple[Address, argparse.Namespace]:
    """In a process that `Children` started: make it end with its parent, and return the
    controller's address and the options of this process, with its rank.

    Args:
        options: names of its program's options, with their types.
    """
    parser = argparse.ArgumentParser()
    own = {"endpoint": str, "parent": int, "rank": int}
    for name, kind in (own | options).items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    secret = bytes.fromhex(os.environ.pop(SECRET_VARIABLE))
    return Address(arguments.endpoint, secret), arguments


def process_state(pid: int) -> State:
    """Return the id and the state of a process of this machine."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return State(f"process {pid}")
    line = next((line for line in status.splitlines() if line.startswith("State:")), "")
    name = line.partition("(")[2].rstrip(")")
    text = f"process {pid}, {name or 'in an unknown state'}"
    return State(text, is_stopped=name in ("stopped", "tracing stop"))


def network_environment(address: Address) -> dict[str, str]:
    """Return the variables that name the network interface for collectives of a process of this
    machine: the interface on the way to the controller, unless the user names another; the loopback
    if all processes are on this machine."""
    if address.host is None:
        name = loopback()
        return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    name = interface_of(address_towards(address.host))
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name else ()
    return {variable: name for variable in variables if variable not in os.environ and name}


def loopback() -> str:
    """Return the name of the loopback interface."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def visible_devices(devices: Sequence[int]) -> str:
    """Return CUDA_VISIBLE_DEVICES for a process that sees some of this process's devices."""
    known = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return ",".join(known[n] if n < len(known) else str(n) for n in devices)
