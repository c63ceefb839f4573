"""One weight sync: export, sender, engine, in the order that vLLM's lifecycle asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mcore_rl.errors import WeightSyncError
from mcore_rl.metrics import Metrics, maximum
from mcore_rl.weight_sync.base import NamedTensors, Sender, UpdateSession


def sync_weights(
    export: Iterable[NamedTensors], sender: Sender[Any], engine: UpdateSession, version: int
) -> Metrics:
    """Give `engine` the exported weights as `version` and return how much was moved.

    Raises:
        WeightSyncError: if the engine does not report the new version afterwards.
    """
    num_buckets = num_bytes = 0
    engine.start_weight_update(version)
    sender.begin(version)
    for bucket in export:
        sender.send(bucket, engine.update_weights)
        num_buckets += 1
        num_bytes += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
    engine.finish_weight_update()
    sender.end()
    if engine.weight_version != version:
        raise WeightSyncError(
            f"engine reports weights {engine.weight_version} after a sync of {version}",
            role="rollout",
        )
    return {
        "weight_sync/bytes": maximum(num_bytes),
        "weight_sync/num_buckets": maximum(num_buckets),
    }
