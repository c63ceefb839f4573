"""`python -m mcore_rl.launch.engine_process`: one engine alone, started by the controller."""

from __future__ import annotations

from functools import partial
from typing import Any

from mcore_rl.launch.channel import WorkerEnd
from mcore_rl.launch.processes import started_child
from mcore_rl.launch.serve import Identity, Servant, serve
from mcore_rl.sockets import Address


def main() -> None:
    """Entry point of an engine that the controller starts as a child."""
    address, arguments = started_child(engine=str, number=int)
    updates = address.beside(f"weights-{arguments.number}")
    serve(
        Identity("engine", arguments.number),
        WorkerEnd(address, arguments.rank),
        partial(_import_library, arguments.engine),
        partial(_start, updates),
    )


def _import_library(engine: str) -> None:
    from mcore_rl.rollout import import_engine

    if engine:
        import_engine(engine)


def _start(updates: Address, spec: Any) -> Servant:
    from mcore_rl.workers.engine_worker import EngineWorker

    return EngineWorker(spec, updates)


if __name__ == "__main__":
    main()
