"""All workers of a run, and typed calls to any of them.

    updates = {rank: call(Actor.update, share, counts, objective) for rank, share in ...}
    metrics = results(workers.submit(updates))

A worker does its calls in the order in which they were submitted; calls to different workers, and
several to one, may be in flight. `submit` is the only way in: launchers and tests implement it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

from mcore_rl.sockets import Address

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Call(Generic[R]):
    """A method of a role with its arguments. One object that goes to several workers is encoded
    once."""

    method: Callable[..., R]
    """Method of a protocol in `workers/roles.py`: `Actor.update`."""
    args: tuple[Any, ...]

    @property
    def name(self) -> str:
        """For messages: "actor.update", "weight_source.send_weights"."""
        role, _, method = self.method.__qualname__.partition(".")
        return f"{re.sub('(?<!^)(?=[A-Z])', '_', role).lower()}.{method}"


@overload
def call(
    method: Callable[Concatenate[Any, P], Future[R]], *args: P.args, **kwargs: P.kwargs
) -> Call[R]: ...


@overload
def call(
    method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs
) -> Call[R]: ...


def call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Call[Any]:
    """Return a call of a role's method; a type checker checks the arguments against the method. If
    the method returns a future, the answer comes when it is done; other calls may run before."""
    assert not kwargs, "arguments go by position"
    return Call(method, args)


class WorkerGroup(Protocol):
    """All workers of a run."""

    world_size: int
    step: int | None
    """Step of the loop, for the messages of failures; the loop sets it."""

    def submit(self, calls: Mapping[int, Call[R]]) -> dict[int, Future[R]]:
        """Hand each addressed rank its call; return futures by rank.

        A future gives the result or raises the error, with rank, role and step. A call that is
        cancelled before its worker has begun it is not done.
        """
        ...

    def restart(self, rank: int) -> Future[None]:
        """Start an engine that is a process of its own again, without weights; the future is done
        when it is up."""
        ...

    def update_address(self, rank: int) -> Address:
        """Return the address where such an engine receives its weights."""
        ...

    def interrupt(self) -> None:
        """Make the engines abort their generation, now and from now on; their answers are then
        meaningless. From any thread."""
        ...

    def close(self) -> None:
        """End all workers in order."""
        ...


def done(value: R) -> Future[R]:
    """Return a future with this result."""
    future: Future[R] = Future()
    future.set_result(value)
    return future


def results(futures: Mapping[int, Future[R]]) -> dict[int, R]:
    """Wait for every result and return them by rank."""
    return {rank: future.result() for rank, future in futures.items()}


def call_all(
    workers: WorkerGroup,
    method: Callable[Concatenate[Any, P], R],
    *args: P.args,
    **kwargs: P.kwargs,
) -> list[R]:
    """Call a method with the same arguments on every worker; return the results by rank."""
    same = call(method, *args, **kwargs)
    return list(results(workers.submit(dict.fromkeys(range(workers.world_size), same))).values())
