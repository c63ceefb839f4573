"""The calls that a controller makes of its workers, by role: one page to read.

A call is a method of one of these protocols, `call(Actor.update, ...)`, so that a type checker
follows it from the controller to the worker. A worker does the calls of its roles; `Worker.roles`
names the class for each.

Every method of actor and critic is collective: all ranks are called together. A *share* is the work
of one data-parallel rank. It is sent to the first of the ranks that work on it, which sends it to
the others; these get None from the controller.

The ranks that report numbers return them; the others return numbers of no sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mcore_rl.errors import WeightSyncError
from mcore_rl.metrics import Metrics
from mcore_rl.types import Denominators, Part, RoutesAt, Share, TokenNumbers, WriteState

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np

    from mcore_rl.rollout.base import EnginePart, GenerationRequest, GenerationResult, PauseMode
    from mcore_rl.rollout.serving import Health
    from mcore_rl.sockets import Address


class Actor(Protocol):
    """The policy that is trained, and its frozen reference."""

    def logprobs(self, share: Share | None) -> TokenNumbers:
        """Return log-probabilities of every trained token."""
        ...

    def record_logprobs(self, share: Share | None) -> tuple[TokenNumbers, Mapping[int, RoutesAt]]:
        """Return log-probabilities, and where the routes of the share's sequences are, by their
        positions in the planned list. Routes are the experts that the routers chose. The rank that
        received the share keeps them; it is also the rank that replays them."""
        ...

    def ref_logprobs(self, share: Share | None) -> TokenNumbers:
        """Return log-probabilities under the reference weights."""
        ...

    def layer_outputs(self, share: Share | None) -> dict[int, Mapping[str, np.ndarray]]:
        """Return the outputs of this rank's layers."""
        ...

    def offload(self, parts: Collection[Part]) -> None:
        """Move these parts of its state to host memory; none of them is there."""
        ...

    def restore(self, parts: Collection[Part]) -> None:
        """Move these parts of its state back to the device; all of them are in host memory."""
        ...

    def begin_step(self) -> None:
        """Move the learning-rate schedule to the coming step."""
        ...

    def update(self, share: Share | None, denominators: Denominators, objective: Any) -> Metrics:
        """Do one optimizer update and return its metrics."""
        ...

    def begin_save(self, folder: str) -> None:
        """Begin to write the training state into `folder`."""
        ...

    def save_state(self, wait: bool) -> WriteState:
        """Return this rank's state of writing."""
        ...

    def finish_save(self) -> None:
        """Complete the checkpoint from the parts that all ranks have written."""
        ...

    def load(self, folder: str) -> None:
        """Read back what was saved."""
        ...

    def export_hf(self, folder: str) -> None:
        """Write the weights as a Hugging Face folder."""
        ...


class Critic(Protocol):
    """The model that predicts the expected reward."""

    def values(self, share: Share | None) -> TokenNumbers:
        """Return the value of every trained token."""
        ...

    def offload(self, parts: Collection[Part]) -> None:
        """Move these parts of its state to host memory; none of them is there."""
        ...

    def restore(self, parts: Collection[Part]) -> None:
        """Move these parts of its state back to the device; all of them are in host memory."""
        ...

    def begin_step(self) -> None:
        """Move the learning-rate schedule to the coming step."""
        ...

    def update(self, share: Share | None, denominators: Denominators, objective: Any) -> Metrics:
        """Do one optimizer update and return its metrics."""
        ...

    def begin_save(self, folder: str) -> None:
        """Begin to write the training state into `folder`."""
        ...

    def save_state(self, wait: bool) -> WriteState:
        """Return this rank's state of writing."""
        ...

    def finish_save(self) -> None:
        """Complete the checkpoint from the parts that all ranks have written."""
        ...

    def load(self, folder: str) -> None:
        """Read back what was saved."""
        ...


@dataclass(frozen=True, slots=True)
class SentWeights:
    """The result of sending weights."""

    metrics: Metrics
    problems: Mapping[int, WeightSyncError]
    """Errors of the engines that did not take the weights, by number; only of separate
    processes."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Short digest of each sent tensor; one rank returns them, the others none."""


class WeightSource(Protocol):
    """The actor's weights, for the engines."""

    def send_weights(
        self, version: int, engines: Mapping[int, Address], with_digests: bool, with_base: bool
    ) -> SentWeights:
        """Send the weights as `version` to the engine in this process, or to those of `engines`
        (addresses by number) that this rank feeds; collective. With `with_digests` the engines keep
        digests of what they loaded. Without the base only the trained weights are sent, if engines
        take them alone."""
        ...


class Rollout(Protocol):
    """A rollout engine, or one rank of it."""

    def generate(
        self, number: int, groups: Sequence[Sequence[GenerationRequest]], keep_routes: bool
    ) -> None:
        """Begin with groups of requests; all ranks of the engine must get the same. With
        `keep_routes`, routes are kept for a replay. No earlier call has this `number`."""
        ...

    def answer(self, number: int, group: int) -> Future[list[GenerationResult]]:
        """Return one result per request, in order, for a group of call `number` of `generate`. Call
        it once, on the engine's first rank. When the run is asked to end, the result is empty;
        engines notice that within a few steps."""
        ...

    def stop(self, number: int) -> None:
        """End the unfinished requests of such a call with their tokens so far."""
        ...

    def pause(self, mode: PauseMode) -> None:
        """Draw no token from here on."""
        ...

    def resume(self) -> None:
        """End a pause."""
        ...

    def sleep(self, level: int) -> None:
        """Free the device's memory."""
        ...

    def wake(self, part: EnginePart) -> None:
        """Allocate the memory of a part again."""
        ...

    def health(self) -> Health:
        """Return the state of the engine."""
        ...

    def loaded_digests(self) -> list[dict[str, str]]:
        """Return digests of what the engine's parts in this process have loaded; see
        `RolloutEngine`."""
        ...

    def digests_of_model(self) -> list[dict[str, str]]:
        """Return digests of what they load from the model's folder; they are then without
        weights."""
        ...


class EngineProcess(Protocol):
    """The process of an engine that runs alone."""

    def receive_weights(self, version: int) -> None:
        """Receive the weights that a train worker is sending as `version`."""
        ...


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What the process of a train worker has held, in bytes."""

    peaks: Mapping[Callable[..., Any], int]
    """Peak during the calls of each method of a role: `Actor.update`."""
    held: int
    """Bytes now, after freed memory has been given back."""
    is_of_host: bool
    """Whether it is the resident set, of a run on CPU, and not the memory of a device."""


class Memory(Protocol):
    """The memory of a train worker's process."""

    def memory_use(self) -> MemoryUse | None:
        """Return the memory since the start of the process; None if it cannot be measured."""
        ...

    def take_peak(self) -> int | None:
        """Return the peak bytes in any call since this method was last called."""
        ...


class RouteHolder(Protocol):
    """The routes stored in a worker, recorded by its engine or its actor."""

    def exchange(self, gives: Mapping[int, np.ndarray], takes: Mapping[int, np.ndarray]) -> None:
        """Send routes to other ranks and receive theirs; all ranks that it names are called
        together.

        Args:
            gives: by receiving rank, [sequences] int64 keys.
            takes: by sending rank, [sequences, 2] int64 keys and tokens - 1.
        """
        ...

    def drop(self) -> None:
        """Drop all routes."""
        ...


def handlers(roles: Mapping[type, Any]) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return the function that does each method of each role, such as `Actor.update`."""
    return {
        method: getattr(holder, name)
        for role, holder in roles.items()
        for name, method in vars(role).items()
        if callable(method) and not name.startswith("_")
    }
