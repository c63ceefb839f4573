"""The host of a rollout engine in a worker process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mcore_rl.metrics import Metrics
from mcore_rl.rollout import load_engine
from mcore_rl.rollout.base import EngineSpec, GenerationRequest, GenerationResult
from mcore_rl.weight_sync.base import TRANSPORTS, Bucket
from mcore_rl.weight_sync.sync import sync_weights


class RolloutWorker:
    """Owns one engine and the transport that feeds it.

    Args:
        spec: what the engine starts from.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.transport = TRANSPORTS.get(spec.config.weight_transport)
        self.engine = load_engine(spec)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Return one result per request, in order."""
        return self.engine.generate(requests)

    def receive(self, export: Iterable[Bucket], version: int) -> Metrics:
        """Take the exported weights as `version`."""
        return sync_weights(export, self.transport, self.engine, version)
