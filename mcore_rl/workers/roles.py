"""The calls that a controller makes of its workers, by role: one page to read.

A call is a method of one of these protocols, `call(Actor.update, ...)`, so that a type checker
follows it from the controller to the worker. A worker answers to the roles that it has; which class
does so stands in `Worker.roles`.

Every method of actor and critic is collective: all ranks are asked together. A *share* is what one
data-parallel rank works on. It is sent to the first rank of those that work on it and spread among
them, so the others are given None.

Numbers come back from the ranks that report them; the others return those of no sequence.
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
        """Return them with where the routes of the share's sequences lie, by their positions in the
        list that was planned: the experts that the routers chose. The rank that was given the share
        keeps them, which is the one that would be given them to replay."""
        ...

    def ref_logprobs(self, share: Share | None) -> TokenNumbers:
        """Return log-probabilities under the reference weights."""
        ...

    def layer_outputs(self, share: Share | None) -> dict[int, Mapping[str, np.ndarray]]:
        """Return what comes out of this rank's layers."""
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
        """Return how far this rank is with writing."""
        ...

    def finish_save(self) -> None:
        """Make what all ranks have written a checkpoint."""
        ...

    def load(self, folder: str) -> None:
        """Read back what was saved."""
        ...

    def export_hf(self, folder: str) -> None:
        """Write the weights as a Hugging Face folder."""
        ...


class Critic(Protocol):
    """The model that says how much reward is to be expected."""

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
        """Return how far this rank is with writing."""
        ...

    def finish_save(self) -> None:
        """Make what all ranks have written a checkpoint."""
        ...

    def load(self, folder: str) -> None:
        """Read back what was saved."""
        ...


@dataclass(frozen=True, slots=True)
class SentWeights:
    """What came of sending weights."""

    metrics: Metrics
    problems: Mapping[int, WeightSyncError]
    """By number of an engine of its own process that did not take them."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """By tensor, what was sent; one rank says it, and the others nothing."""


class WeightSource(Protocol):
    """The actor's weights, for the engines."""

    def send_weights(
        self, version: int, engines: Mapping[int, Address], with_digests: bool, with_base: bool
    ) -> SentWeights:
        """Send them as `version` to the engine in this process, or to those of `engines` (by
        number: where they listen) that this rank feeds, which then know what they loaded if
        `with_digests`; collective. Without the base only what trains is sent, where engines take
        that by itself."""
        ...


class Rollout(Protocol):
    """A rollout engine, or one rank of it."""

    def generate(
        self, number: int, groups: Sequence[Sequence[GenerationRequest]], keep_routes: bool
    ) -> None:
        """Begin with groups of requests; all ranks of the engine must be given the same. Routes to
        be replayed are kept. `number` is of no earlier call."""
        ...

    def answer(self, number: int, group: int) -> Future[list[GenerationResult]]:
        """Return one result per request, in order, of a group that call `number` of `generate`
        gave; asked of the engine's first rank, once. Nothing when the run is asked to end, which
        engines notice within a few steps."""
        ...

    def stop(self, number: int) -> None:
        """End the unfinished requests of such a call with what they have."""
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
        """Take the memory of a part back."""
        ...

    def health(self) -> Health:
        """Return how the engine is."""
        ...

    def loaded_digests(self) -> list[dict[str, str]]:
        """Return what the engine's parts hosted here have loaded; see `RolloutEngine`."""
        ...

    def digests_of_model(self) -> list[dict[str, str]]:
        """Return what they load from the model's folder; afterwards they are without weights."""
        ...


class EngineProcess(Protocol):
    """The process of an engine by itself."""

    def receive_weights(self, version: int) -> None:
        """Take the weights that a train worker sends as `version` meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What the process of a train worker has held, in bytes."""

    peaks: Mapping[Callable[..., Any], int]
    """At most during the calls of each method of a role: `Actor.update`."""
    held: int
    """Now, when what is freed has been given back."""
    is_of_host: bool
    """Whether it is the resident set, of a run on CPU, and not the memory of a device."""


class Memory(Protocol):
    """Who knows what a train worker's process holds."""

    def memory_use(self) -> MemoryUse | None:
        """Return what it has held since it started; None where nothing tells."""
        ...

    def take_peak(self) -> int | None:
        """Return the most bytes that it has held in a call since this was asked last."""
        ...


class RouteHolder(Protocol):
    """The routes that lie in a worker, recorded by its engine or its actor."""

    def exchange(self, gives: Mapping[int, np.ndarray], takes: Mapping[int, np.ndarray]) -> None:
        """Give routes to other ranks and take theirs; all ranks that it names are asked together.

        Args:
            gives: by rank that is given some, [sequences] int64 keys.
            takes: by rank that gives some, [sequences, 2] int64 keys and tokens - 1.
        """
        ...

    def drop(self) -> None:
        """Forget all routes."""
        ...


def handlers(roles: Mapping[type, Any]) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return what does each method of each role, `Actor.update`, of those who answer to it."""
    return {
        method: getattr(holder, name)
        for role, holder in roles.items()
        for name, method in vars(role).items()
        if callable(method) and not name.startswith("_")
    }
