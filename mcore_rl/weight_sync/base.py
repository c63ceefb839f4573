"""Weight transports: how one bucket of weights gets from the trainer to an engine.

The trainer exports full tensors under their Hugging Face names, layer by layer, in buckets of
bounded size; a transport hands each bucket to the engine inside its update session. A new
transport is one file with a function like those registered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from mcore_rl.registry import Registry
from mcore_rl.rollout.base import RolloutEngine

Bucket = Sequence[tuple[str, Tensor]]
"""Full tensors under their Hugging Face names, whole layers, in layer order."""


class WeightTransport(Protocol):
    """Sends one bucket to an engine whose update session is open."""

    def __call__(self, bucket: Bucket, engine: RolloutEngine) -> None: ...


TRANSPORTS: Registry[WeightTransport] = Registry("weight transport", "rollout.weight_transport")


@TRANSPORTS.register("direct")
def send_directly(bucket: Bucket, engine: RolloutEngine) -> None:
    """Hand tensors by reference to an engine in the same process."""
    engine.update_weights({"named_tensors": list(bucket)})
