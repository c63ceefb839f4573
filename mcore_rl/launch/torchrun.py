"""Workers that torchrun started, also under Slurm: rank 0's process is the controller and starts
rank 0's worker as a child; the processes of all other ranks are workers.

torchrun's own store, to which anybody may write who reaches its port, carries nothing but where the
controller listens. On one machine that is a socket in a folder whose owner and mode are checked;
between machines a port that is bound to the address on the way to the master, and who connects must
have the run's secret: of the environment (MCORE_RL_CHANNEL_SECRET) or of a file in the user's home.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_rl.cluster.placement import EnginePlace, Placement
from mcore_rl.errors import UserError, require
from mcore_rl.launch import worker_process
from mcore_rl.launch.channel import Listener, WorkerEnd, end_now
from mcore_rl.launch.folder import PrivateFolder, is_private
from mcore_rl.launch.group import SILENCE_S, ChannelWorkers, GiveUp
from mcore_rl.launch.local import EngineProcesses
from mcore_rl.launch.processes import SECRET_VARIABLE, Children, Ended
from mcore_rl.launch.worker_process import serve_rank
from mcore_rl.sockets import Address

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

ENDPOINT_LIMIT = timedelta(minutes=30)
"""For rank 0 to say where it listens, which it does before it reads the data."""
AGENT_ECHO_S = 10.0
"""torchrun's agent ends all processes as soon as one has failed; within this time the controller
learns which, also on a busy machine."""
_ENDPOINT, _PIDS = "mcore_rl/endpoint", "mcore_rl/pid"
_SECRET_FILE = "secret"
_USER_SECRET = Path(".mcore_rl") / "channel_secret"


def is_launched() -> bool:
    """Whether this process is one of a launched set (torchrun and Slurm's torchrun set RANK)."""
    return "RANK" in os.environ


def rank() -> int:
    """Return this process's global rank; 0 when it was started alone."""
    return int(os.environ.get("RANK", "0"))


def shared_store(is_master: bool = False) -> Store:
    """Return the store of all processes, which is the agent's unless it hosts none."""
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
    # The agent's store outlives processes that it starts again.
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class TorchrunProcesses:
    """See `Processes`: rank 0's worker is a child, the others are known by their connections and,
    on this machine, by their process ids."""

    def __init__(
        self,
        placement: Placement,
        address: Address,
        store: Store,
        folder: PrivateFolder | None,
        engine: str,
    ) -> None:
        self.placement = placement
        self._store = store  # it may be hosted here
        self._folder = folder
        self._children = Children(address)
        environment = {"RANK": "0", "LOCAL_RANK": "0"}
        environment |= {} if folder is None else {"GLOO_SOCKET_IFNAME": "lo"}
        options = {"store": "", "engine": "" if placement.engines else engine}
        self._children.start(0, worker_process, environment, options)
        self._engines = None
        if folder is not None:
            self._engines = EngineProcesses(self._children, engine, folder, placement)
        self._beside = range(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._pidfds: dict[int, int] = {}
        self._pids: dict[int, int] = {}

    def ended(self) -> Mapping[int, Ended]:
        self._find_beside()
        found = self._children.ended()
        for rank, pidfd in self._pidfds.items():
            if select.select([pidfd], [], [], 0)[0]:
                found[rank] = Ended(None)
        return found

    def state(self, rank: int) -> str:
        from mcore_rl.launch.processes import process_state

        if rank in self._pids:
            return process_state(self._pids[rank])
        return self._children.state(rank)

    def kill_one(self, rank: int) -> None:
        self._children.kill_one(rank)

    def restart(self, engine: EnginePlace) -> None:
        assert self._engines is not None, "engines apart are on one machine"
        self._engines.start(engine)

    def update_address(self, engine: EnginePlace) -> Address:
        assert self._engines is not None, "engines apart are on one machine"
        return self._engines.update_address(engine)

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
        UserError: if another number of processes was launched, or engines of their own would be on
            other machines.
    """
    world_size = placement.world_size
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise UserError(
            f"trainer.n_gpus_per_node * trainer.nnodes = {world_size}, but {launched} processes "
            "were launched. Make them agree."
        )
    require(
        not placement.engines or _is_one_machine(),
        "rollout.host",
        "process",
        "starts engines on the controller's machine alone",
        "Use in_process on several machines.",
    )
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
    address = Address(listener.endpoint, address.secret)
    store.set(_ENDPOINT, address.endpoint)
    processes = TorchrunProcesses(placement, address, store, folder, engine)
    return ChannelWorkers(listener, processes, hang_timeout_s, give_up)


def serve_controller() -> None:
    """On every other rank: be a worker until the controller says that it is over."""
    store = shared_store()
    if _is_one_machine():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store.set(f"{_PIDS}/{rank()}", str(os.getpid()))
    store.wait([_ENDPOINT], ENDPOINT_LIMIT)
    endpoint = store.get(_ENDPOINT).decode()
    silence_s = None if _is_one_machine() else SILENCE_S
    end = WorkerEnd(Address(endpoint, _secret_of(endpoint)), rank(), silence_s)
    serve_rank(end, lambda: store, engine="")


def _is_one_machine() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _secret_of(endpoint: str) -> bytes:
    """Return the secret that belongs to an endpoint, which a stranger may have written."""
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
    """Return the secret of the environment, or that of the user's home, made by who comes first."""
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
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, int(os.environ["MASTER_PORT"])))
        except OSError as error:
            raise UserError(f"MASTER_ADDR={master} cannot be reached: {error}.") from error
        found = probe.getsockname()[0]
    if found.startswith("127."):
        raise UserError(
            f"MASTER_ADDR={master} is {found}, which other machines do not reach. Name the address "
            "of rank 0's machine on the network between the nodes."
        )
    return found


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL, 0o600)
