"""One weight sync: export, transport, engine, in the order that vLLM's lifecycle asks for."""

from __future__ import annotations

from collections.abc import Iterable

from mcore_rl.errors import WeightSyncError
from mcore_rl.metrics import Metrics, maximum
from mcore_rl.rollout.base import RolloutEngine
from mcore_rl.weight_sync.base import Bucket, WeightTransport


def sync_weights(
    export: Iterable[Bucket], transport: WeightTransport, engine: RolloutEngine, version: int
) -> Metrics:
    """Give `engine` the exported weights as `version` and return how much was moved.

    Raises:
        WeightSyncError: if the engine does not report the new version afterwards.
    """
    num_buckets = num_bytes = 0
    engine.start_weight_update()
    for bucket in export:
        transport(bucket, engine)
        num_buckets += 1
        num_bytes += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
    engine.finish_weight_update(version)
    if engine.weight_version != version:
        raise WeightSyncError(
            f"engine reports weights {engine.weight_version} after a sync of {version}",
            role="rollout",
        )
    return {
        "weight_sync/bytes": maximum(num_bytes),
        "weight_sync/num_buckets": maximum(num_buckets),
    }
