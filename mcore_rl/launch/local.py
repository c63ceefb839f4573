"""Workers and engines on this machine, as children of the controller.

Nothing listens but sockets in a folder that only this user may enter, and gloo on the loopback
interface.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping

from mcore_rl.cluster.placement import EnginePlace, Placement
from mcore_rl.launch import engine_process, worker_process
from mcore_rl.launch.channel import Listener
from mcore_rl.launch.folder import PrivateFolder
from mcore_rl.launch.group import ChannelWorkers, GiveUp
from mcore_rl.launch.processes import Children, Ended
from mcore_rl.sockets import Address


class EngineProcesses:
    """Engines as children of the controller, on its machine.

    Args:
        children: of the controller.
        name: of the engine: `rollout.name`.
        folder: of their sockets.
        placement: of the run.
    """

    def __init__(
        self, children: Children, name: str, folder: PrivateFolder, placement: Placement
    ) -> None:
        self._children, self._name, self._folder = children, name, folder
        self._placement = placement
        for place in placement.engines:
            self.start(place)

    def start(self, place: EnginePlace) -> None:
        """Start the process of an engine, or another one in its place."""
        devices = list(place.devices)
        if place.node >= self._placement.num_nodes:  # its own are those behind the trainer's here
            first = self._placement.world_size + place.engine * len(devices)
            devices = list(range(first, first + len(devices)))
        environment = {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices)),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "VLLM_HOST_IP": "127.0.0.1",
            # Several engines and workers share the cores: the system deals them out.
            "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        }
        library = self._name if place.devices else ""  # a server has it
        options = {"engine": library, "rank": place.rank, "number": place.engine}
        self._children.start(place.rank, engine_process, environment, options)

    def update_address(self, place: EnginePlace) -> Address:
        """See `Processes`."""
        return Address(f"ipc://{self._folder.path}/weights-{place.engine}", b"")


class LocalProcesses:
    """See `Processes`; with the folder of their sockets."""

    def __init__(
        self, placement: Placement, address: Address, folder: PrivateFolder, engine: str
    ) -> None:
        self.placement, self._folder = placement, folder
        world_size = placement.world_size
        environment = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": _loopback(),
            "NCCL_SOCKET_IFNAME": _loopback(),
        }
        if world_size > 1:
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        self._children = Children(address)
        inside = "" if placement.engines else engine
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            options = {"store": folder.path / "store", "engine": inside}
            self._children.start(rank, worker_process, environment | own, options)
        self._engines = EngineProcesses(self._children, engine, folder, placement)

    def ended(self) -> Mapping[int, Ended]:
        return self._children.ended()

    def state(self, rank: int) -> str:
        return self._children.state(rank)

    def kill_one(self, rank: int) -> None:
        self._children.kill_one(rank)

    def restart(self, engine: EnginePlace) -> None:
        self._engines.start(engine)

    def update_address(self, engine: EnginePlace) -> Address:
        return self._engines.update_address(engine)

    def wait(self, seconds: float) -> bool:
        return self._children.wait(seconds)

    def kill(self) -> None:
        self._children.kill()
        self._folder.remove()


def open_workers(
    placement: Placement, engine: str, hang_timeout_s: float, give_up: GiveUp
) -> ChannelWorkers:
    """Start the processes of a run and return them; `start` builds the workers in them.

    Args:
        placement: which they are.
        engine: name of the rollout engine, whose library they import meanwhile; "": none.
        hang_timeout_s: see `ChannelWorkers`.
        give_up: see `ChannelWorkers`.
    """
    folder = PrivateFolder()
    address = Address(f"ipc://{folder.path}/calls", secrets.token_bytes(32))
    listener = Listener(address)
    processes = LocalProcesses(placement, address, folder, engine)
    return ChannelWorkers(listener, processes, hang_timeout_s, give_up)


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
