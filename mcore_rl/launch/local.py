"""Workers on this machine, as children of the controller.

Nothing listens but sockets in a folder that only this user may enter, and gloo on the loopback
interface.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping

from mcore_rl.launch.channel import Address, Listener
from mcore_rl.launch.folder import PrivateFolder
from mcore_rl.launch.group import ChannelWorkers, GiveUp
from mcore_rl.launch.processes import Children, Ended


class LocalProcesses:
    """See `Processes`; with the folder of their sockets."""

    def __init__(self, world_size: int, address: Address, folder: PrivateFolder, engine: str):
        self.world_size, self._folder = world_size, folder
        environment = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": _loopback(),
            "NCCL_SOCKET_IFNAME": _loopback(),
        }
        if world_size > 1:
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
        store = str(folder.path / "store")
        self._children = Children(range(world_size), address, store, engine, environment)

    def ended(self) -> Mapping[int, Ended]:
        return self._children.ended()

    def state(self, rank: int) -> str:
        return self._children.state(rank)

    def wait(self, seconds: float) -> bool:
        return self._children.wait(seconds)

    def kill(self) -> None:
        self._children.kill()
        self._folder.remove()


def open_workers(
    world_size: int, engine: str, hang_timeout_s: float, give_up: GiveUp
) -> ChannelWorkers:
    """Start worker processes and return them; `start` builds the workers in them.

    Args:
        world_size: how many.
        engine: name of the rollout engine, whose library they import meanwhile; "": none.
        hang_timeout_s: see `ChannelWorkers`.
        give_up: see `ChannelWorkers`.
    """
    folder = PrivateFolder()
    address = Address(f"ipc://{folder.path}/calls", secrets.token_bytes(32))
    listener = Listener(address)
    processes = LocalProcesses(world_size, address, folder, engine)
    return ChannelWorkers(listener, processes, hang_timeout_s, give_up)


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
