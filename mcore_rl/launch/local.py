"""Workers and engines on this machine, as children of the controller.

The only listeners are sockets in a folder that only this user may enter, and gloo on the loopback
interface.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from mcore_rl.cluster.placement import EnginePlace, Placement
from mcore_rl.launch.channel import Listener
from mcore_rl.launch.folder import PrivateFolder
from mcore_rl.launch.group import ChannelWorkers, GiveUp
from mcore_rl.launch.processes import Children, Ended, State
from mcore_rl.launch.programs import devices_beside, engine_program, worker_program
from mcore_rl.sockets import Address


class LocalProcesses:
    """See `Processes`. It also owns the folder of their sockets."""

    nodes: Sequence[int] = ()

    def __init__(
        self, placement: Placement, address: Address, folder: PrivateFolder, engine: str
    ) -> None:
        self.placement, self._folder, self._engine = placement, folder, engine
        self._children = Children(address)
        store, rendezvous = str(folder.path / "store"), {"MASTER_ADDR": "127.0.0.1"}
        for place in placement.places:
            self._children.start(worker_program(place, placement, engine, store, rendezvous))
        for place in placement.engines:
            self.restart(place)

    def heard(self, report: Mapping[str, Any]) -> None:
        pass

    def is_remote(self, rank: int) -> bool:
        return False

    def ended(self) -> Mapping[int, Ended]:
        return self._children.ended()

    def state(self, rank: int) -> State:
        return self._children.state(rank)

    def kill_one(self, rank: int) -> None:
        self._children.kill_one(rank)

    def restart(self, engine: EnginePlace) -> None:
        devices = devices_beside(self.placement, engine)
        self._children.start(engine_program(engine, self._engine, devices))

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
        placement: says which processes there are.
        engine: name of the rollout engine, whose library they import meanwhile; "": none.
        hang_timeout_s: see `ChannelWorkers`.
        give_up: see `ChannelWorkers`.
    """
    folder = PrivateFolder()
    address = Address(f"ipc://{folder.path}/calls", secrets.token_bytes(32))
    listener = Listener(address)
    processes = LocalProcesses(placement, address, folder, engine)
    return ChannelWorkers(listener, processes, hang_timeout_s, give_up)
