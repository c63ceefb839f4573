"""`python -m mcore_rl.launch.worker_process`: one train worker, started by the controller."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from mcore_rl.launch.channel import WorkerEnd
from mcore_rl.launch.processes import started_child
from mcore_rl.launch.serve import Identity, Servant, serve
from mcore_rl.processes import collective_backend

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

COLLECTIVE_GRACE_S = 300.0
"""Seconds that a collective waits longer than the watch, whose report says more."""


def main() -> None:
    """Entry point of a worker that the controller starts as a child."""
    address, arguments = started_child(store=str, engine=str)
    end = WorkerEnd(address, arguments.rank)
    serve_rank(end, lambda: open_store(arguments.store), arguments.engine)


def open_store(file: str) -> Store:
    """Return the store for the rendezvous of all workers: a file, or torchrun's if none is
    named."""
    if not file:
        from mcore_rl.launch.torchrun import shared_store

        return shared_store()
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

    return FileStore(file, int(os.environ["WORLD_SIZE"]))


def serve_rank(end: WorkerEnd, make_store: Callable[[], Store], engine: str) -> NoReturn:
    """Run as one rank of the train workers until the controller ends the run.

    Args:
        end: of the channel.
        make_store: returns the store for the rendezvous of all workers.
        engine: name of the rollout engine, whose library is imported first; "": none.
    """
    who = Identity("worker", int(os.environ["RANK"]))
    serve(who, end, partial(_import_libraries, engine), lambda value: _start(value, make_store()))


def _import_libraries(engine: str) -> None:
    import mcore_rl.workers.worker  # noqa: F401  Megatron: seconds
    from mcore_rl.rollout import import_engine

    if engine:
        import_engine(engine)


def _start(value: tuple[Any, int, float], store: Store) -> Servant:
    import torch
    import torch.distributed as dist

    from mcore_rl.workers.worker import Worker

    spec, world_size, hang_timeout_s = value
    os.environ["WORLD_SIZE"] = str(world_size)  # torchrun counts the processes of engines too
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        collective_backend(device.type),
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        timeout=datetime.timedelta(seconds=hang_timeout_s + COLLECTIVE_GRACE_S),
    )
    return _Rank(Worker(spec, device))


class _Rank:
    """A `Servant`: a train worker, which does only its calls."""

    endpoint = ""
    is_busy = False

    def __init__(self, worker: Any) -> None:
        self._worker, self.handlers = worker, worker.handlers

    def run(self) -> None:
        raise AssertionError("never busy")

    def close(self) -> None:
        """Close the worker when every rank has reached this point."""
        import torch.distributed as dist

        dist.barrier()
        self._worker.close()
        if dist.is_initialized():  # vLLM destroys the default group with its engine
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
