"""`python -m mcore_rl.launch.engine_process`: one engine by itself, started by the controller."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import Any

from mcore_rl.launch.channel import WorkerEnd
from mcore_rl.launch.processes import SECRET_VARIABLE
from mcore_rl.launch.serve import Identity, Servant, serve
from mcore_rl.processes import die_with_parent
from mcore_rl.sockets import Address


def main() -> None:
    """Entry point of an engine that the controller starts as a child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--number", type=int, required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    secret = bytes.fromhex(os.environ.pop(SECRET_VARIABLE))
    address = Address(arguments.endpoint, secret)
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
