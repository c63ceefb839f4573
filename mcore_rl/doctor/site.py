"""The place that the doctor checks: facts that several checks need, found once."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import runpy
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mcore_rl.doctor.children import Answer, ask

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Node:
    """This machine among those that torchrun started."""

    number: int
    count: int
    master: str
    """Address of the first."""
    port: int
    """Of torchrun's store."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The installation, the machine and what is asked of them."""

    run_folder: Path
    """Where runs are written, or would be."""
    deadline_s: float
    """Of everything that runs in a process of its own."""
    node: Node | None = None
    """None: the doctor looks at one machine."""
    live: frozenset[str] = frozenset()
    """Probes that are run anyway: what one of them imports need not be imported by itself."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _answers: dict[Any, Future[Answer]] = field(default_factory=dict, repr=False)

    def ask(self, name: str, *args: str, environment: Mapping[str, str] | None = None) -> Answer:
        """Return what came of a probe, which is run once however many checks ask for it."""
        environment = dict(environment or {})
        key = name, args, tuple(environment.items())
        with self._lock:
            is_first = key not in self._answers
            future = self._answers.setdefault(key, Future())
        if is_first:
            try:
                future.set_result(
                    ask(name, *args, deadline_s=self.deadline_s, environment=environment)
                )
            except BaseException as error:  # who else waits for it learns of it
                future.set_exception(error)
                raise
        return future.result()

    @cached_property
    def cuda(self) -> str | None:
        """CUDA's version that the installed torch is built for; None: a CPU build, or no torch.

        Read without importing torch, which might fail.
        """
        found = importlib.util.find_spec("torch")
        file = Path(found.origin).with_name("version.py") if found and found.origin else None
        if file is None or not file.is_file():
            return None
        return runpy.run_path(str(file)).get("cuda")

    @property
    def has_driver(self) -> bool:
        """Whether NVIDIA's driver is loaded."""
        return _DRIVER.exists()

    @property
    def driver(self) -> str:
        """The driver's own line on its version; "" without one."""
        return _DRIVER.read_text().splitlines()[0] if self.has_driver else ""

    @property
    def devices(self) -> Answer:
        """What torch says of the CUDA devices of this machine; see `probe.devices`."""
        return self.ask("devices")

    @property
    def num_devices(self) -> int:
        """CUDA devices that torch can use; 0 with a CPU build."""
        if self.cuda is None:
            return 0
        values: dict[str, Any] = self.devices.values or {}
        return len(values.get("devices", []))

    @property
    def places(self) -> list[tuple[str, dict[str, str]]]:
        """Where something is computed, with the environment of a process there: ("cuda:0", ...) for
        each device, or ("", ...) for the CPU."""
        if not self.num_devices:
            return [("", self.interfaces)]
        return [
            (f"cuda:{number}", {**self.interfaces, "CUDA_VISIBLE_DEVICES": self.device(number)})
            for number in range(self.num_devices)
        ]

    @property
    def interfaces(self) -> dict[str, str]:
        """The environment of collectives; on one machine, as a run has it: the loopback."""
        if self.is_several:
            return {}
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        return {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}

    @cached_property
    def is_several(self) -> bool:
        """Whether other machines are to be met: the master is at no loopback address."""
        if self.node is None or self.node.count == 1:
            return False
        try:
            master = socket.gethostbyname(self.node.master)
        except OSError:
            return True
        return not ipaddress.ip_address(master).is_loopback

    def device(self, number: int) -> str:
        """Return what CUDA_VISIBLE_DEVICES has to be, so that a process sees this device alone."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = [name for name in visible.split(",") if name]
        return names[number] if number < len(names) else str(number)


def node_of_torchrun() -> Node:
    """Return the place of this machine from what torchrun says to its processes."""
    of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Node(
        number=int(os.environ["RANK"]) // of_machine,
        count=int(os.environ["WORLD_SIZE"]) // of_machine,
        master=os.environ["MASTER_ADDR"],
        port=int(os.environ["MASTER_PORT"]),
    )
