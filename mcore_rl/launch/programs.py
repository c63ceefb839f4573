"""The program that is started for each place of a run; every launcher starts the same."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from mcore_rl.cluster.placement import EnginePlace, Place, Placement
from mcore_rl.launch import engine_process, worker_process
from mcore_rl.launch.processes import Program


def worker_program(
    place: Place, placement: Placement, engine: str, store: str, environment: Mapping[str, str]
) -> Program:
    """Return the program of a train worker.

    Args:
        place: of the worker.
        placement: of the run.
        engine: name of the rollout engine, whose library it imports; "": none.
        store: file for the rendezvous of all workers; "": torchrun's store, or one like it.
        environment: variables in addition to those for its place, such as MASTER_ADDR.
    """
    of_node = sum(other.node == place.node for other in placement.places)
    own = {
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.device),
        "WORLD_SIZE": str(placement.world_size),
        "LOCAL_WORLD_SIZE": str(of_node),
    }
    if placement.world_size > 1:
        own["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return Program(
        rank=place.rank,
        main=worker_process.main,
        options={"store": store, "engine": "" if placement.engines else engine},
        environment=own | dict(environment),
    )


def engine_program(
    place: EnginePlace, engine: str, devices: Sequence[int] | None = None, attempt: int = 0
) -> Program:
    """Return the program of an engine.

    Args:
        place: of the engine.
        engine: name of the rollout engine.
        devices: of its machine, if they differ from those of its place.
        attempt: see `Program`.
    """
    library = engine if place.devices else ""  # a server has imported it itself
    return Program(
        rank=place.rank,
        main=engine_process.main,
        options={"engine": library, "number": place.engine},
        environment={
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "VLLM_HOST_IP": "127.0.0.1",  # for the rendezvous of this engine's parts
            # Several engines and workers share the cores: the system schedules them.
            "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        },
        devices=place.devices if devices is None else devices,
        attempt=attempt,
    )


def devices_beside(placement: Placement, place: EnginePlace) -> Sequence[int]:
    """Return the devices of an engine whose node is also a machine of the trainer: those after the
    trainer's, if the engine has devices of its own."""
    if place.node < placement.num_nodes:
        return place.devices
    first = placement.world_size + place.engine * len(place.devices)
    return range(first, first + len(place.devices))
