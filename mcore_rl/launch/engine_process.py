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
    end = WorkerEnd(Address(arguments.endpoint, secret), arguments.rank, silence_s=None)
    serve(
        Identity("engine", arguments.number),
        end,
        partial(_import_library, arguments.engine),
        _start,
    )


def _import_library(engine: str) -> None:
    from mcore_rl.rollout import import_engine

    if engine:
        import_engine(engine)


def _start(spec: Any) -> Servant:
    from mcore_rl.workers.engine_worker import EngineWorker

    return EngineWorker(spec)


if __name__ == "__main__":
    main()
