"""The host of a rollout engine in a worker process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mcore_rl.metrics import Metrics
from mcore_rl.rollout import load_engine
from mcore_rl.rollout.base import EngineSpec, GenerationRequest, GenerationResult
from mcore_rl.weight_sync.base import TRANSPORTS, Bucket
from mcore_rl.weight_sync.sync import sync_weights


class RolloutWorker:
    """Owns one engine, or a part of one, and the transport that feeds it.

    Engine e has the ranks e * size .. e * size + size - 1, each with a part of every layer.

    Args:
        spec: what the engine starts from.
        rank: of this process.
    """

    def __init__(self, spec: EngineSpec, rank: int) -> None:
        self.number, self._part = divmod(rank, spec.config.tensor_model_parallel_size)
        self.transport = TRANSPORTS.get(spec.config.weight_transport)
        self.engine = load_engine(spec)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Return one result per request, in order; nothing on ranks but the engine's first.

        Every rank of the engine must be given the same requests.
        """
        results = self.engine.generate(requests)
        return results if self._part == 0 else []

    def receive(self, export: Iterable[Bucket], version: int) -> Metrics:
        """Take the exported weights as `version`."""
        return sync_weights(export, self.transport, self.engine, version)
