"""Workers that torchrun started, also under Slurm: rank 0's process is the controller and starts
rank 0's worker as a child; the processes of all other ranks are workers. Machines with only engines
come after those of the trainer: their first process starts the engines.

Anybody who reaches the port of torchrun's own store may write to it, so it carries only the address
where the controller listens. On one machine that is a socket in a folder whose owner and mode are
checked. Between machines it is a port bound to the address on the way to the master, and a process
that connects must have the run's secret: from the environment (MCORE_RL_CHANNEL_SECRET) or from a
file in the user's home.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_rl.cluster.placement import EnginePlace, Placement
from mcore_rl.errors import UserError, require
from mcore_rl.foreign_json import parse_json
from mcore_rl.launch import node_process
from mcore_rl.launch.channel import Listener, WorkerEnd, end_now
from mcore_rl.launch.folder import PrivateFolder, is_private
from mcore_rl.launch.group import ChannelWorkers, GiveUp
from mcore_rl.launch.node_process import serve_node
from mcore_rl.launch.nodes import Nodes
from mcore_rl.launch.processes import (
    SECRET_VARIABLE,
    Children,
    Ended,
    Program,
    State,
    network_environment,
    process_state,
)
from mcore_rl.launch.programs import devices_beside, engine_program, worker_program
from mcore_rl.launch.worker_process import serve_rank
from mcore_rl.sockets import Address, address_towards

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

ENDPOINT_LIMIT = timedelta(minutes=30)
"""For rank 0 to publish where it listens, which it does before it reads the data."""
FAILURE_GRACE_S = 10.0
"""Seconds. torchrun's agent ends all processes as soon as one has failed; within this time the
controller learns which one, also on a busy machine."""
_RENDEZVOUS, _PIDS = "mcore_rl/rendezvous", "mcore_rl/pid"
_SECRET_FILE = "secret"
_USER_SECRET = Path(".mcore_rl") / "channel_secret"


def is_launched() -> bool:
    """Whether this process is one of a launched set (torchrun and Slurm's torchrun set RANK)."""
    return "RANK" in os.environ


def rank() -> int:
    """Return this process's global rank; 0 when it was started alone."""
    return int(os.environ.get("RANK", "0"))


def shared_store(is_master: bool = False) -> Store:
    """Return the store of all processes: the agent's, unless the agent hosts none."""
    from torch.distributed import (
        PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
        TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    )

    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_master and not is_hosted,
        timeout=ENDPOINT_LIMIT,
        wait_for_workers=False,
    )
    # The agent's store stays when the agent starts the processes again.
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class TorchrunProcesses:
    """See `Processes`: rank 0's worker and the engines of this machine are children; node processes
    start the engines of other machines. The other workers are known by their connections and, on
    this machine, by their process ids.

    Args:
        placement: of the run.
        listener: of the channel.
        store: of all processes; it may be hosted here.
        folder: of the sockets, if all processes are on this machine.
        engine: name of the rollout engine.
        node_ranks: rank of the node process, by machine.
    """

    def __init__(
        self,
        placement: Placement,
        listener: Listener,
        store: Store,
        folder: PrivateFolder | None,
        engine: str,
        node_ranks: Mapping[int, int],
    ) -> None:
        self.placement = placement
        self.nodes: Sequence[int] = list(node_ranks)
        self._store, self._folder, self._engine = store, folder, engine
        self._children = Children(listener.address)
        self._children.start(worker_program(placement.places[0], placement, engine, "", {}))
        self._nodes = Nodes(listener, node_ranks)
        for place in placement.engines:
            self.restart(place)
        self._beside = range(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._pidfds: dict[int, int] = {}
        self._pids: dict[int, int] = {}

    def heard(self, report: Mapping[str, Any]) -> None:
        self._nodes.heard(report)

    def is_remote(self, rank: int) -> bool:
        return self._folder is None and rank not in self._children and rank not in self._beside

    def ended(self) -> Mapping[int, Ended]:
        self._find_beside()
        found = self._children.ended() | self._nodes.ended()
        for rank, pidfd in self._pidfds.items():
            if select.select([pidfd], [], [], 0)[0]:
                found[rank] = Ended(None)
        return found

    def state(self, rank: int) -> State:
        world = self.placement.world_size
        if rank in self._pids:
            return process_state(self._pids[rank])
        for known in (self._children, self._nodes):
            if rank in known:
                return known.state(rank)
        node = f"of node {self.placement.places[rank].node}" if rank < world else "a node process"
        return State(node)

    def kill_one(self, rank: int) -> None:
        if rank in self._nodes:
            self._nodes.kill_one(rank)
        else:
            self._children.kill_one(rank)

    def restart(self, engine: EnginePlace) -> None:
        if engine.node in self.nodes:
            self._nodes.start(engine.node, engine_program(engine, self._engine))
        else:
            devices = devices_beside(self.placement, engine)
            self._children.start(engine_program(engine, self._engine, devices))

    def wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        left = list(self._pidfds.values())
        while left and time.monotonic() < deadline:
            ended = select.select(left, [], [], deadline - time.monotonic())[0]
            left = [pidfd for pidfd in left if pidfd not in ended]
        return self._children.wait(max(0.0, deadline - time.monotonic())) and not left

    def kill(self) -> None:
        self._children.kill()
        for pidfd in self._pidfds.values():
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._folder is not None:
            self._folder.remove()

    def _find_beside(self) -> None:
        """Learn the process ids of the ranks on this machine."""
        for rank in self._beside:
            key = f"{_PIDS}/{rank}"
            if rank not in self._pids and self._store.check([key]):
                self._pids[rank] = int(self._store.get(key))
                self._pidfds[rank] = os.pidfd_open(self._pids[rank])


def open_workers(
    placement: Placement, engine: str, hang_timeout_s: float, give_up: GiveUp
) -> ChannelWorkers:
    """On rank 0: return all workers, which are starting; `start` builds the workers in them.

    Raises:
        UserError: if the launched processes are not those of the placement.
    """
    first_ranks = _first_ranks(placement)
    store = shared_store(is_master=True)
    folder = None
    if _is_one_machine():
        folder = PrivateFolder()
        address = Address(f"ipc://{folder.path}/calls", secrets.token_bytes(32))
        with open(folder.path / _SECRET_FILE, "wb", opener=_private) as file:
            file.write(address.secret)
    else:
        address = Address(f"tcp://{_own_address()}:*", _user_secret())
    listener = Listener(address)
    # Machines with engines have a node process, except this one, whose engines are children.
    with_engines = {place.node for place in placement.engines} - {0}
    far = sorted(with_engines) if folder is None else []
    node_ranks = {
        node: placement.world_size + len(placement.engines) + n for n, node in enumerate(far)
    }
    published = {
        "endpoint": listener.address.endpoint,
        "num_workers": placement.world_size,
        "nodes": {str(first_ranks[node]): rank for node, rank in node_ranks.items()},
    }
    store.set(_RENDEZVOUS, json.dumps(published))
    processes = TorchrunProcesses(placement, listener, store, folder, engine, node_ranks)
    return ChannelWorkers(listener, processes, hang_timeout_s, give_up)


def _first_ranks(placement: Placement) -> list[int]:
    """Return the rank of the first process that torchrun started on each machine.

    Raises:
        UserError: if the launched processes are not those of the placement.
    """
    workers, launched = placement.world_size, int(os.environ.get("WORLD_SIZE", "1"))
    per_node = sum(place.node == 0 for place in placement.places)
    first_ranks = list(range(0, workers, per_node))
    own = [place for place in placement.engines if place.node >= placement.num_nodes]
    if not own or launched == workers:
        require(
            launched == workers,
            "trainer.n_gpus_per_node * trainer.nnodes",
            workers,
            f"does not fit the {launched} processes that were launched",
            "Make them agree.",
        )
        require(
            not own or _is_one_machine(),
            "rollout.nnodes",
            len({place.node for place in own}),
            "has no processes: torchrun started those of the trainer's nodes alone",
            "Start torchrun on the nodes of the engines too, with the same --nnodes for all.",
        )
        return first_ranks
    num_nodes = len({place.node for place in own})
    devices = sum(len(place.devices) for place in own) // num_nodes
    wanted = {workers + num_nodes * each: each for each in (1, devices)}
    require(
        launched in wanted,
        "rollout.nnodes",
        num_nodes,
        f"and the trainer's {workers} workers do not fit the {launched} processes that were "
        "launched",
        f"On a node of engines start one process, or {devices}: {' or '.join(map(str, wanted))} "
        "in all.",
    )
    return first_ranks + [workers + n * wanted[launched] for n in range(num_nodes)]


def serve_controller() -> None:
    """On every other rank: run as a worker, or as a node process, until the controller ends the
    run."""
    store = shared_store()
    if _is_one_machine():
        store.set(f"{_PIDS}/{rank()}", str(os.getpid()))
    store.wait([_RENDEZVOUS], ENDPOINT_LIMIT)
    try:
        rendezvous = parse_json(store.get(_RENDEZVOUS))
        endpoint, num_workers = str(rendezvous["endpoint"]), int(rendezvous["num_workers"])
        node_rank = rendezvous["nodes"].get(str(rank()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"torchrun's store does not say where the controller is: {what}") from error
    address = Address(endpoint, _secret_of(endpoint))
    os.environ.update(network_environment(address))
    if rank() >= num_workers:
        if node_rank is not None:
            serve_node(address, int(node_rank))
        return  # on a machine whose engines the node process starts
    children = Children(address)
    if node_rank is not None:
        children.start(Program(rank=int(node_rank), main=node_process.main))
    serve_rank(WorkerEnd(address, rank()), lambda: store, engine="")


def _is_one_machine() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _secret_of(endpoint: str) -> bytes:
    """Return the secret that belongs to an endpoint. A stranger may have written the endpoint."""
    if not endpoint.startswith("ipc://"):
        return _user_secret()
    folder = Path(endpoint.removeprefix("ipc://")).parent
    if is_private(folder):
        with contextlib.suppress(FileNotFoundError):
            return (folder / _SECRET_FILE).read_bytes()
    if not folder.exists():
        end_now()  # the controller has ended already, and has said why
    raise UserError(f"{folder}, where the controller is said to listen, is not private.")


def _user_secret() -> bytes:
    """Return the secret of the environment, or of the user's home; the first process makes it."""
    if text := os.environ.get(SECRET_VARIABLE):
        try:
            return bytes.fromhex(text)
        except ValueError as error:
            raise UserError(f"{SECRET_VARIABLE} must be hexadecimal digits: {error}.") from error
    file = Path.home() / _USER_SECRET
    file.parent.mkdir(mode=0o700, exist_ok=True)
    made = file.with_name(f"{file.name}.{os.uname().nodename}.{os.getpid()}")
    with open(made, "wb", opener=_private) as handle:
        handle.write(secrets.token_bytes(32))
    try:
        os.link(made, file)
    except FileExistsError:
        pass
    finally:
        made.unlink()
    if file.stat().st_mode & 0o077:
        raise UserError(f"{file} can be read by others: chmod 600 {file}")
    return file.read_bytes()


def _own_address() -> str:
    """Return the address of this machine on the way to the master, where all others find it."""
    master = os.environ["MASTER_ADDR"]
    try:
        found = address_towards(master, int(os.environ["MASTER_PORT"]))
    except OSError as error:
        raise UserError(f"MASTER_ADDR={master} cannot be reached: {error}.") from error
    if found.startswith("127."):
        raise UserError(
            f"MASTER_ADDR={master} is {found}, which other machines do not reach. Name the address "
            "of rank 0's machine on the network between the nodes."
        )
    return found


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL, 0o600)
