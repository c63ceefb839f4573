"""Weight transports: how the trained weights get from a train worker into an engine.

The trainer exports full tensors under their Hugging Face names, in layer order, in buckets. A
transport has two ends: the sender, beside the trainer, makes an update of each bucket and has it
delivered to the engine; the receiver, inside the engine's process, makes tensors of it again and
has them loaded.

    train worker                            process of the engine
    export -> Sender.send(bucket)  --update-->  Receiver.receive(update) -> load(tensors)

What an update is, the transport alone knows: the tensors themselves, the file that they are in, or
their names and shapes while they come by another road. An engine hands it on to the receiver, and
knows no transport; the sender knows no engine. Nothing here is of one engine's library.

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
"""What a sender makes of a bucket and its receiver understands. It may have to travel to another
process: a small object that pickles, unless the transport reaches the same process alone."""

Deliver: TypeAlias = Callable[[Update], None]
"""Hands an update to the engine and returns when the engine has loaded it."""


class Distance(Enum):
    """Where an engine is, seen from the train worker that sends to it."""

    SAME_PROCESS = "in the train worker's process"
    SAME_MACHINE = "in another process of the train worker's machine"
    OTHER_MACHINE = "on another machine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A train worker and what of an engine it feeds: what both ends are built from.

    An engine in the train worker's process, or a part of one, has one receiver. An engine of
    another process has one for each of its own workers, which all get every update.
    """

    transport: str
    """Name: `rollout.weight_transport`."""
    run_folder: str
    """Folder of the run, seen by every process of it; a transport may have files there."""
    engine: int
    """Number of the engine."""
    engine_rank: int
    """Rank in it of what the train worker feeds."""
    num_receivers: int = 1
    """How many receivers the sender feeds."""
    receiver: int = 0
    """Which of them this is, where a receiver is opened."""
    address: str = "127.0.0.1"
    """Of the train worker's machine, by which the engine reaches it."""

    def open_sender(self) -> Sender[Any]:
        """Return the end beside the trainer."""
        return TRANSPORTS.get(self.transport).sender(self)

    def open_receiver(self) -> Receiver[Any]:
        """Return the end inside the engine; call it in the process that loads the weights."""
        return TRANSPORTS.get(self.transport).receiver(self)


class Sender(ABC, Generic[Update]):
    """The end beside the trainer.

    Every sync is `begin`, `send` of one bucket after the other, `end`, as one session of the
    engine: it has begun when `begin` is called. When `end` is, the engine has all weights, or the
    sync broke off anywhere since: what `begin` and `send` made is freed in either case.
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
        """Free what this sync needed."""

    def close(self) -> None:
        """Free what all syncs needed."""


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

        An engine may keep them until it has all of a layer, which others may bring: they must not
        change before `end`.
        """

    def end(self) -> None:
        """Free what this sync needed; the engine has loaded all weights, or gives them up."""

    def close(self) -> None:
        """Free what all syncs needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport(Generic[Update]):
    """Both ends of a way for weights."""

    sender: Callable[[Link], Sender[Update]]
    receiver: Callable[[Link], Receiver[Update]]
    reaches: frozenset[Distance]
    """Where the engine may be."""
    update: type[Update] | None = None
    """A dataclass of what JSON can hold, which is what the sender delivers; None: it is no such
    thing, and servers are not reached."""


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
            with_digests: have the full form of what is loaded at hand afterwards; takes time.
        """
        ...

    def update_weights(self, update: Any) -> None:
        """Load what the sender delivers; return when it is loaded."""
        ...

    def finish_weight_update(self, manifest: Manifest) -> None:
        """Close the session, forget what was computed under other weights, take the version.

        Args:
            manifest: of what was exported.

        Raises:
            WeightSyncError: if that is not what reached the engine's loader. The session is then
                still open, and to be aborted.
        """
        ...

    def abort_weight_update(self) -> None:
        """Give up the session, which may be anywhere; the engine is left without weights."""
        ...
