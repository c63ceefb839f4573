"""The transport `direct`: tensors by reference, to an engine in the train worker's process."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.weight_sync.base import (
    TRANSPORTS,
    Deliver,
    Distance,
    Load,
    NamedTensors,
    Receiver,
    Sender,
    Transport,
)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The bucket itself."""

    named_tensors: NamedTensors


class DirectSender(Sender[Tensors]):
    """Delivers the bucket itself."""

    def send(self, bucket: NamedTensors, deliver: Deliver[Tensors]) -> None:
        deliver(Tensors(bucket))


class DirectReceiver(Receiver[Tensors]):
    """Loads the delivered tensors."""

    def receive(self, update: Tensors, load: Load) -> None:
        load(update.named_tensors)


TRANSPORTS.add(
    "direct",
    Transport(
        sender=DirectSender,
        receiver=DirectReceiver,
        reaches=frozenset({Distance.SAME_PROCESS}),
    ),
)
