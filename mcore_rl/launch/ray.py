"""Workers and engines on the machines of a Ray cluster; the command is the Ray driver.

Ray gives the run its machines: one placement group with a bundle for each node of the placement. In
each bundle runs an actor, a node process (`launch/node_process.py`), which starts the same
processes as the other launchers. From then on all is the same as with them: the channel, the watch
and the end. No data of the run passes through Ray's object store: the channel sends each share
once, to one rank.

The cluster is the one at RAY_ADDRESS, or one of this machine alone, which ends with the run. Token
authentication follows Ray's default: on, unless RAY_AUTH_MODE says otherwise.
"""

from __future__ import annotations

import datetime
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mcore_rl.cluster.placement import EnginePlace, Placement
from mcore_rl.durable_files import make_private
from mcore_rl.errors import RunError, UserError, require
from mcore_rl.launch.channel import Listener
from mcore_rl.launch.folder import PrivateFolder
from mcore_rl.launch.group import ChannelWorkers, GiveUp
from mcore_rl.launch.node_process import serve_node
from mcore_rl.launch.nodes import Nodes
from mcore_rl.launch.processes import SECRET_VARIABLE, Ended, State
from mcore_rl.launch.programs import engine_program, worker_program
from mcore_rl.sockets import Address
from mcore_rl.stores import serve_store

logger = logging.getLogger(__name__)

Resources = Mapping[str, float]
"""What a machine has, or must have, by Ray's names: CPU, GPU."""

CONNECT_LIMIT_S = 5.0
"""Seconds for the cluster's head to answer."""
PLACEMENT_LIMIT_S = 600.0
"""Seconds to wait until other jobs of the cluster free the resources that this one needs."""
MEETING_LIMIT = datetime.timedelta(minutes=30)
"""For the rendezvous of the workers, which first import their libraries."""
REMINDER_S = 10.0
"""Seconds between two log lines that say what the run waits for."""
OBJECT_STORE_BYTES = 100 << 20
"""For a cluster that the run starts for itself: almost nothing passes through the store."""
FORWARDED = (
    "HF_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "MCORE_RL_",
    "VLLM_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "OMP_",
    "MKL_",
    "CUDA_DEVICE_",
    "PYTHONPATH",
)
"""Prefixes of the driver's variables that the processes of all machines get."""


class NodeActor:
    """The part of the run on one machine, as an actor."""

    def serve(self, address: Address, rank: int, folder: str, environment: Mapping[str, str]):
        """Run as a node process until the end of the run, which ends the actor.

        Args:
            address: of the controller.
            rank: of this process.
            folder: working folder of the driver, for relative paths; entered if it exists here.
            environment: forwarded variables of the driver.
        """
        if Path(folder).is_dir():
            os.chdir(folder)
        if "OMP_NUM_THREADS" not in environment:  # Ray sets it to the CPUs of the actor
            os.environ.pop("OMP_NUM_THREADS", None)
        os.environ.update(environment)
        serve_node(address, rank)


class RayProcesses:
    """See `Processes`: all processes are children of the node actors.

    Args:
        placement: of the run.
        listener: of the channel.
        group: Ray's placement group, with a bundle for each node.
        bundles: resources of each bundle.
        store: for the rendezvous of the workers.
        engine: name of the rollout engine.
        folder: holds the link to the cluster's files, if this run started the cluster.
    """

    def __init__(
        self,
        placement: Placement,
        listener: Listener,
        group: Any,
        bundles: Sequence[Resources],
        store: Any,
        engine: str,
        folder: PrivateFolder | None,
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.placement, self._engine = placement, engine
        self._group, self._store, self._folder = group, store, folder
        first = placement.world_size + len(placement.engines)
        self.nodes: Sequence[int] = range(len(bundles))
        ranks = {node: first + node for node in self.nodes}
        actor_class, environment = ray.remote(NodeActor), forwarded(os.environ)
        self._actors, self._ends = {}, {}
        for node, bundle in enumerate(bundles):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
            actor: Any = actor_class.options(
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=place,
                max_restarts=0,
            ).remote()
            self._actors[ranks[node]] = actor
            self._ends[ranks[node]] = actor.serve.remote(
                listener.address, ranks[node], os.getcwd(), environment
            )
        self._nodes = Nodes(listener, ranks)
        rendezvous = {"MASTER_ADDR": str(listener.address.host), "MASTER_PORT": str(store.port)}
        for worker in placement.places:
            self._nodes.start(
                worker.node, worker_program(worker, placement, engine, "", rendezvous)
            )
        for place in placement.engines:
            self.restart(place)

    def heard(self, report: Mapping[str, Any]) -> None:
        self._nodes.heard(report)

    def is_remote(self, rank: int) -> bool:
        return True

    def ended(self) -> Mapping[int, Ended]:
        import ray

        found: dict[int, Ended] = dict(self._nodes.ended())
        for rank, end in self._ends.items():
            if ray.wait([end], timeout=0)[0]:
                found[rank] = Ended(None, _problem(end))
        return found

    def state(self, rank: int) -> State:
        return State("an actor") if rank in self._actors else self._nodes.state(rank)

    def kill_one(self, rank: int) -> None:
        self._nodes.kill_one(rank)

    def restart(self, engine: EnginePlace) -> None:
        self._nodes.start(engine.node, engine_program(engine, self._engine))

    def wait(self, seconds: float) -> bool:
        import ray

        ends = list(self._ends.values())
        return not ray.wait(ends, num_returns=len(ends), timeout=seconds)[1]

    def kill(self) -> None:
        import ray

        for actor in self._actors.values():
            ray.kill(actor)
        ray.util.remove_placement_group(self._group)
        ray.shutdown()
        if self._folder is not None:
            self._folder.remove()


def open_workers(
    run_folder: Path,
    placement: Placement,
    engine: str,
    hang_timeout_s: float,
    give_up: GiveUp,
) -> ChannelWorkers:
    """Return all workers, which are starting; `start` builds the workers in them.

    Args:
        run_folder: holds the files of a cluster that the run starts.
        placement: of the run.
        engine: name of the rollout engine, whose library they import meanwhile; "": none.
        hang_timeout_s: see `ChannelWorkers`.
        give_up: see `ChannelWorkers`.

    Raises:
        UserError: if Ray is not installed, the cluster is not there, or it has too few CPUs or
            devices.
        RunError: if other jobs do not free the needed resources within `PLACEMENT_LIMIT_S`.
    """
    ray = _ray()
    address = os.environ.get("RAY_ADDRESS", "")
    folder = None
    if address:
        join_cluster(address)
    else:
        folder = PrivateFolder()
        num_cpus = sum(bundle["CPU"] for bundle in bundles_of(placement, on_devices=False))
        _start_cluster(folder, run_folder, int(num_cpus))
    on_devices = ray.cluster_resources().get("GPU", 0) > 0
    bundles = bundles_of(placement, on_devices)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if (problem := missing(bundles, nodes)) is not None:
        raise UserError(f"the Ray cluster is too small: {problem}.")
    logger.info(
        "Ray at %s: %d nodes, on %s",
        ray.get_runtime_context().gcs_address,
        len(nodes),
        "its GPUs" if on_devices else "CPUs, it has no GPU",
    )
    group = _place(bundles)
    host = ray.util.get_node_ip_address() if folder is None else "127.0.0.1"
    listener = Listener(Address(f"tcp://{host}:*", secrets.token_bytes(32)))
    store = serve_store(host, MEETING_LIMIT)
    processes = RayProcesses(placement, listener, group, bundles, store, engine, folder)
    return ChannelWorkers(listener, processes, hang_timeout_s, give_up)


def launcher(run_folder: Path) -> Any:
    """Return `open_workers` with the arguments that all launchers have."""
    return partial(open_workers, run_folder)


def bundles_of(placement: Placement, on_devices: bool) -> list[dict[str, float]]:
    """Return what the run needs on each of its nodes: a CPU for each process that has a device of
    its own, and the device if the machines have some."""
    counts = [0] * (1 + max(p.node for p in (*placement.places, *placement.engines)))
    for worker in placement.places:
        counts[worker.node] += 1
    for engine in placement.engines:
        if engine.node >= placement.num_nodes:  # others share the trainer's devices
            counts[engine.node] += len(engine.devices)
    return [{"CPU": float(n)} | ({"GPU": float(n)} if on_devices else {}) for n in counts]


def missing(bundles: Sequence[Resources], nodes: Sequence[Resources]) -> str | None:
    """Return what the machines lack to hold all bundles, each bundle on one machine; None: nothing.

    Args:
        bundles: wanted.
        nodes: what each machine has.
    """
    left = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda bundle: -bundle["CPU"]):
        fits = [node for node in left if all(node.get(k, 0) >= n for k, n in bundle.items())]
        if not fits:
            have = "; ".join(_listed({k: node.get(k, 0) for k in bundle}) for node in nodes)
            wanted = " + ".join(_listed(one) for one in bundles)
            return f"wanted {wanted}, each on one node; the nodes have {have or 'nothing'}"
        tightest = min(fits, key=lambda node: node["CPU"])  # keeps large nodes free for the rest
        for name, number in bundle.items():
            tightest[name] -= number
    return None


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the driver that all processes of the run get."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(FORWARDED) and name != SECRET_VARIABLE
    }


def _listed(resources: Resources) -> str:
    return " and ".join(f"{number:g} {name}" for name, number in resources.items())


def _ray() -> Any:
    """Return Ray's module.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            f"trainer.launcher=ray needs Ray, which is not there ({error}). "
            "Install it: pip install 'mcore-rl[ray]'."
        ) from error
    return ray


def join_cluster(address: str) -> Any:
    """Become a driver of a cluster; return Ray's module.

    Raises:
        UserError: if Ray is not installed, or the cluster is not there.
    """
    ray = _ray()
    require(
        not address.startswith("ray://"),
        "RAY_ADDRESS",
        address,
        "is of a Ray client, which is not a driver",
        "Start the run in the cluster: ray job submit.",
    )
    logger.info("joining the Ray cluster at %s", address)
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit():  # Ray itself tries for a minute
            socket.create_connection((host, int(port)), timeout=CONNECT_LIMIT_S).close()
        ray.init(address=address, configure_logging=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        what = str(error).strip().splitlines()[0]
        raise UserError(
            f"RAY_ADDRESS={address} cannot be joined: {what}. "
            "Start one with ray start --head, or unset RAY_ADDRESS."
        ) from error
    return ray


def submit_to_nodes(function: Callable[..., Any], *args: Any) -> list[tuple[str, Any]]:
    """Run a function once on every machine of the joined cluster, with all devices of the machine;
    return its host name and Ray's reference of the result, by machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote(function)
    submitted = []
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = remote.options(
                num_cpus=0,
                num_gpus=node["Resources"].get("GPU", 0),
                max_retries=0,
                scheduling_strategy=there,
            ).remote(*args)
            submitted.append((node["NodeManagerHostname"], task))
    return submitted


def _start_cluster(folder: PrivateFolder, run_folder: Path, num_cpus: int) -> None:
    """Start a cluster on this machine, with its files in the run folder. They are reached by a
    link, because the path of a socket must be short."""
    import ray

    files = run_folder.resolve() / "ray"
    make_private(files)
    link = folder.path / "ray"
    link.symlink_to(files)
    logger.info("starting a Ray cluster of this machine")
    ray.init(
        address="local",
        num_cpus=max(num_cpus, os.cpu_count() or 1),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        configure_logging=False,
        logging_level=logging.ERROR,
        _temp_dir=str(link),
    )


def _place(bundles: Sequence[Resources]) -> Any:
    """Wait until the cluster has room for the bundles; return the placement group with them."""
    import ray
    from ray.util.placement_group import placement_group

    group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
    deadline = time.monotonic() + PLACEMENT_LIMIT_S
    while not group.wait(REMINDER_S):
        free = ray.available_resources()
        has = _listed({name: free.get(name, 0) for name in bundles[0]})
        what = f"{' + '.join(_listed(bundle) for bundle in bundles)}; free are {has}"
        if time.monotonic() > deadline:
            raise RunError(f"the Ray cluster had no room for {what}", role="controller")
        logger.warning("waiting for the Ray cluster to have room for %s", what)
    return group


def _problem(end: Any) -> str:
    """Return in one line why an actor ended."""
    import ray
    from ray.exceptions import RayError

    try:
        ray.get(end)
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    return "its call ended"
