"""`python -m mcore_rl.launch.worker_process`: one worker, started by the controller.

It imports what workers need while the controller reads the data, then does what it is told. It does
not speak of its failures: the controller does.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from mcore_rl.errors import RunError, UserError
from mcore_rl.launch import channel
from mcore_rl.launch.channel import Address, WorkerEnd
from mcore_rl.launch.processes import SECRET_VARIABLE
from mcore_rl.processes import die_with_parent

if TYPE_CHECKING:
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

COLLECTIVE_GRACE_S = 300.0
"""A collective may wait longer than the watch over it, which says more."""


def main() -> None:
    """Entry point of a worker that the controller starts as a child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--engine", required=True)
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    secret = bytes.fromhex(os.environ.pop(SECRET_VARIABLE))
    end = WorkerEnd(Address(arguments.endpoint, secret), int(os.environ["RANK"]), silence_s=None)
    serve(end, lambda: open_store(arguments.store), arguments.engine)


def open_store(file: str) -> Store:
    """Return the store in which all workers meet: a file, or torchrun's where there is none."""
    if not file:
        from mcore_rl.launch.torchrun import shared_store

        return shared_store()
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

    return FileStore(file, int(os.environ["WORLD_SIZE"]))


def serve(end: WorkerEnd, make_store: Callable[[], Store], engine: str) -> NoReturn:
    """Do what the controller says until it says that it is over, which ends the process.

    Args:
        end: of the channel.
        make_store: returns the store in which all workers meet.
        engine: name of the rollout engine, whose library is imported beforehand; "": none.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the controller ends its workers in order
        signal.signal(number, signal.SIG_IGN)
    from mcore_rl.launch.libraries import quiet_libraries
    from mcore_rl.observability.log_setup import setup_logging
    from mcore_rl.plugins import import_plugins

    quiet_libraries()
    setup_logging(int(os.environ["RANK"]), "worker")
    worker: Any = None
    handlers: Mapping[Any, Callable[..., Any]] = {}
    try:
        import_plugins()
        _import_libraries(engine)
    except Exception as error:  # noqa: BLE001  told when asked to start
        _tell(end, end.next(), error)
        while end.next().kind != channel.END:  # an exit would look like the cause of what was told
            pass
        end.answer(None)
        _end(end)
    while True:
        order = end.next()
        try:
            if order.kind == channel.START:
                worker = _start(order.read(), make_store())
                handlers = worker.handlers
                end.answer(None)
            elif order.kind == channel.CALL:
                method, args = order.read()
                end.answer(handlers[method](*args))
            else:
                _close(worker)
                end.answer(None)
                _end(end)
        except Exception as error:  # noqa: BLE001  whatever it is, the controller must know
            _tell(end, order, error)


def _import_libraries(engine: str) -> None:
    import mcore_rl.workers.worker  # noqa: F401  Megatron: seconds
    from mcore_rl.rollout import import_engine

    if engine:
        import_engine(engine)


def _start(value: tuple[Any, int, float], store: Store) -> Any:
    import torch
    import torch.distributed as dist

    from mcore_rl.workers.worker import Worker

    spec, world_size, hang_timeout_s = value
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=world_size,
        timeout=datetime.timedelta(seconds=hang_timeout_s + COLLECTIVE_GRACE_S),
    )
    worker = Worker(spec, device)
    gc.collect()
    gc.freeze()
    return worker


def _close(worker: Any) -> None:
    """Close the worker when every rank has come this far."""
    if worker is None:
        return
    import torch.distributed as dist

    dist.barrier()
    worker.close()
    if dist.is_initialized():  # vLLM destroys the default group with its engine
        dist.destroy_process_group()


def _end(end: WorkerEnd) -> NoReturn:
    """End the process as the interpreter does it: vLLM frees its shared memory then."""
    end.close()
    gc.unfreeze()
    sys.exit(0)


def _tell(end: WorkerEnd, order: channel.Order, error: Exception) -> None:
    role = f"worker, {order.header.get('name', 'close')}"
    end.fail(_located(error, role, order.header.get("step")), traceback.format_exc())


def _located(error: Exception, role: str, step: int | None) -> Exception:
    """Return the error as one that pickles, with rank, role and step; a user's mistake as it is."""
    if isinstance(error, UserError):
        return UserError(str(error))
    known = error if isinstance(error, RunError) else RunError(f"{type(error).__name__}: {error}")
    return type(known)(
        known.message,
        rank=int(os.environ["RANK"]) if known.rank is None else known.rank,
        role=known.role or role,
        step=step if known.step is None else known.step,
    )


if __name__ == "__main__":
    main()
