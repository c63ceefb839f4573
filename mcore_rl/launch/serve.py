"""What every process behind the channel does: it follows orders until the order to end.

It does not report its failures itself: the controller does.
"""

from __future__ import annotations

import gc
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from mcore_rl.errors import RunError, UserError
from mcore_rl.launch import channel
from mcore_rl.launch.channel import Order, WorkerEnd
from mcore_rl.processes import raise_file_limit


class Servant(Protocol):
    """The object that does the calls in a process."""

    @property
    def handlers(self) -> Mapping[Callable[..., Any], Callable[..., Any]]:
        """The function that does it here, by method of a role. If it returns a future, the future's
        result is the answer."""
        ...

    @property
    def endpoint(self) -> str:
        """Another address where it listens, which the controller learns at the start; "": none."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether there is work other than the calls."""
        ...

    def run(self) -> None:
        """Do a piece of that work."""
        ...

    def close(self) -> None:
        """Free all resources."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """The name of this process in logs and errors."""

    kind: str
    """"worker" or "engine"."""
    number: int
    """Rank of a worker, number of an engine."""


def serve(
    who: Identity,
    end: WorkerEnd,
    import_libraries: Callable[[], None],
    start: Callable[[Any], Servant],
) -> NoReturn:
    """Follow the controller's orders until the order to end, which ends the process.

    Args:
        who: identity of this process.
        end: of the channel.
        import_libraries: called first, while the controller reads the data.
        start: makes the servant from the controller's start value.
    """
    # The controller ends its workers in order.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    from mcore_rl.launch.libraries import quiet_libraries
    from mcore_rl.observability.log_setup import log_to_file, setup_logging
    from mcore_rl.plugins import import_plugins

    quiet_libraries()
    raise_file_limit()
    setup_logging(who.number, who.kind)
    gc.disable()  # garbage collection is a fifth of the imports' time
    try:
        import_plugins()
        import_libraries()
        gc.freeze()
        gc.enable()
    except Exception as error:  # noqa: BLE001  reported when asked to start
        _tell(who, end, end.next(), error)
        while (order := end.next()).kind != channel.END:
            pass  # an exit would look like the cause of the reported error
        _end(end, order)
    servant: Servant | None = None
    while True:
        order = end.next_if_any() if servant is not None and servant.is_busy else end.next()
        try:
            if order is None:
                assert servant is not None
                servant.run()
            elif order.kind == channel.START:
                if folder := order.header["logs"]:
                    log_to_file(Path(folder), who.number, who.kind)
                servant = start(order.read())
                gc.collect()
                gc.freeze()
                end.answer(order, servant.endpoint)
            elif order.kind == channel.CALL:
                assert servant is not None, "the start comes first"
                method, args = order.read()
                _answer(who, end, order, servant.handlers[method](*args))
            else:
                if servant is not None:
                    servant.close()
                _end(end, order)
        except Exception as error:
            if order is None:
                raise
            _tell(who, end, order, error)


def _answer(who: Identity, end: WorkerEnd, order: Order, value: Any) -> None:
    if isinstance(value, Future):
        value.add_done_callback(partial(_answer_later, who, end, order))
    else:
        end.answer(order, value)


def _answer_later(who: Identity, end: WorkerEnd, order: Order, future: Future[Any]) -> None:
    error = future.exception()
    if error is None:
        end.answer(order, future.result())
    else:
        _tell(who, end, order, error)


def _end(end: WorkerEnd, order: Order) -> NoReturn:
    """End the process as the interpreter does it, so that vLLM frees its shared memory."""
    end.answer(order, None)
    end.close()
    gc.unfreeze()
    sys.exit(0)


def _tell(who: Identity, end: WorkerEnd, order: Order, error: BaseException) -> None:
    trace = "".join(traceback.format_exception(error))
    end.fail(order, _located(error, who, order), trace)


def _located(error: BaseException, who: Identity, order: Order) -> Exception:
    """Return the error in picklable form, with rank, role and step; a user's mistake unchanged."""
    if isinstance(error, UserError):
        return UserError(str(error))
    known = error if isinstance(error, RunError) else RunError(f"{type(error).__name__}: {error}")
    is_worker, step = who.kind == "worker", order.header.get("step")
    name = who.kind if is_worker else f"{who.kind} {who.number}"
    own_role = f"{name}, {order.header.get('name', 'close')}"
    return type(known)(
        known.message,
        rank=who.number if is_worker and known.rank is None else known.rank,
        role=known.role if is_worker and known.role else own_role,
        step=step if known.step is None else known.step,
    )
