"""Weight transports: how the trained weights get from a train worker into an engine.

The trainer exports full tensors under their Hugging Face names, in layer order, in buckets. A
transport has two ends: the sender, beside the trainer, makes an update of each bucket and has it
delivered to the engine; the receiver, inside the engine's process, makes tensors of it again and
has them loaded.

    train worker                            process of the engine
    export -> Sender.send(bucket)  --update-->  Receiver.receive(update) -> load(tensors)

Only the transport knows what an update is: the tensors themselves, the file with them, or their
names and shapes while they come by another way. An engine passes it to the receiver, and does not
know the transport; the sender does not know the engine. Nothing here depends on an engine's
library.

No torch at run time: the names are read with the configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

from mcore_rl.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_rl.weight_sync.digest import Manifest

NamedTensors: TypeAlias = "Sequence[tuple[str, Tensor]]"
"""Full tensors under their Hugging Face names."""

Load: TypeAlias = Callable[[NamedTensors], None]
"""Loads tensors into the engine's model, all of a bucket or some; any number of times."""

Update = TypeVar("Update")
"""What a sender makes of a bucket and its receiver understands. It may be sent to another process:
then it is a small picklable object. Only a transport within one process may use other objects."""

Deliver: TypeAlias = Callable[[Update], None]
"""Hands an update to the engine and returns when the engine has loaded it."""


class Distance(Enum):
    """Where an engine is, seen from the train worker that sends to it."""

    SAME_PROCESS = "in the train worker's process"
    SAME_MACHINE = "in another process of the train worker's machine"
    OTHER_MACHINE = "on another machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A train worker and the part of an engine that it feeds; both ends are built from it.

    An engine in the train worker's process, or a part of one, has one receiver. An engine in
    another process has one for each of its own workers, and all of them get every update.
    """

    transport: str
    """Name: `rollout.weight_transport`."""
    run_folder: str
    """Folder of the run, readable by all its processes; a transport may have files there."""
    engine: int
    """Number of the engine."""
    engine_rank: int
    """Rank, in the engine, of the part that the train worker feeds."""
    num_receivers: int = 1
    """How many receivers the sender feeds."""
    receiver: int = 0
    """Number of this receiver, when a receiver is opened."""
    address: str = "127.0.0.1"
    """Address of the train worker's machine, as the engine reaches it."""

    def open_sender(self) -> Sender[Any]:
        """Return the end beside the trainer."""
        return TRANSPORTS.get(self.transport).sender(self)

    def open_receiver(self) -> Receiver[Any]:
        """Return the end inside the engine; call it in the process that loads the weights."""
        return TRANSPORTS.get(self.transport).receiver(self)


class Sender(ABC, Generic[Update]):
    """The end beside the trainer.

    Every sync is `begin`, `send` of one bucket after the other, `end`, in one session of the
    engine, which is open before `begin`. At `end` the engine has all weights, or the sync has
    broken off at some point. In both cases `end` frees what `begin` and `send` allocated.
    """

    def __init__(self, link: Link) -> None:
        self.link = link

    def begin(self, version: int) -> None:
        """Prepare to send the weights of a version."""

    @abstractmethod
    def send(self, bucket: NamedTensors, deliver: Deliver[Update]) -> None:
        """Send one bucket, by as many updates as it takes; return when all are delivered to all
        receivers.

        `deliver` blocks until the receiver is done. Where both ends must act at one time, as in a
        broadcast, call it from a thread.
        """

    def end(self) -> None:
        """Free the resources of this sync."""

    def close(self) -> None:
        """Free the resources of all syncs."""


class Receiver(ABC, Generic[Update]):
    """The end inside the engine: `begin`, `receive` of one update after the other, `end`, which
    comes after a sync that broke off too."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def begin(self, version: int) -> None:
        """Prepare to receive the weights of a version."""

    @abstractmethod
    def receive(self, update: Update, load: Load) -> None:
        """Call `load` with the tensors of one update.

        An engine may keep them until it has the whole layer, which may need further updates. So
        they must not change before `end`.
        """

    def end(self) -> None:
        """Free the resources of this sync; the engine has loaded all weights, or drops them."""

    def close(self) -> None:
        """Free the resources of all syncs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport(Generic[Update]):
    """Both ends of a weight transport."""

    sender: Callable[[Link], Sender[Update]]
    receiver: Callable[[Link], Receiver[Update]]
    reaches: frozenset[Distance]
    """Where the engine may be."""
    update: type[Update] | None = None
    """Type of the updates, if it is a dataclass that JSON can hold. None: it is not, and the
    transport cannot reach servers."""


TRANSPORTS: Registry[Transport[Any]] = Registry("weight transport", "rollout.weight_transport")


class UpdateSession(Protocol):
    """How an engine takes new weights; it cannot generate from the start to the finish."""

    @property
    def weight_version(self) -> int:
        """Version of the weights; -1 before the first session is finished and while one is open."""
        ...

    def start_weight_update(self, version: int, with_digests: bool = False) -> None:
        """Open a session for the weights of a version.

        Args:
            version: of the weights.
            with_digests: whether to compute full digests of what is loaded; takes time.
        """
        ...

    def update_weights(self, update: Any) -> None:
        """Load an update of the sender; return when it is loaded."""
        ...

    def finish_weight_update(self, manifest: Manifest) -> None:
        """Close the session, drop caches of other weights, set the version.

        Args:
            manifest: of the exported tensors.

        Raises:
            WeightSyncError: if other tensors reached the engine's loader. The session is then still
                open, and must be aborted.
        """
        ...

    def abort_weight_update(self) -> None:
        """Abort the session at any point; afterwards the engine is without weights."""
        ...
