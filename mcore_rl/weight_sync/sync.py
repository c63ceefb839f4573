"""One weight sync: export, sender, engine, in the order that vLLM's lifecycle asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from mcore_rl.errors import RunError, WeightSyncError
from mcore_rl.metrics import Metrics, maximum
from mcore_rl.weight_sync.base import NamedTensors, Sender, UpdateSession
from mcore_rl.weight_sync.digest import Manifest


def sync_weights(
    export: Iterable[NamedTensors],
    sender: Sender[Any],
    engine: UpdateSession,
    version: int,
    with_digests: bool = False,
) -> Metrics:
    """Give `engine` the exported weights as `version` and return how much was moved.

    Args:
        export: buckets of full tensors.
        sender: whose receivers are the engine's.
        engine: takes the weights; one whose session breaks off cannot generate afterwards.
        version: of the weights.
        with_digests: as in `UpdateSession.start_weight_update`.

    Raises:
        WeightSyncError: if the engine got other weights than were exported, or does not report the
            new version afterwards.
    """
    num_buckets = num_bytes = 0
    manifest = Manifest()
    engine.start_weight_update(version, with_digests)
    try:
        try:
            sender.begin(version)
            for bucket in export:
                manifest.add(bucket)
                sender.send(bucket, engine.update_weights)
                num_buckets += 1
                num_bytes += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
                del bucket  # before the next is made
            engine.finish_weight_update(manifest)
        finally:
            sender.end()
    except BaseException:
        with contextlib.suppress(RunError):  # an engine that is gone needs no telling
            engine.abort_weight_update()
        raise
    if engine.weight_version != version:
        raise WeightSyncError(
            f"engine reports weights {engine.weight_version} after a sync of {version}",
            role="rollout",
        )
    return {
        "weight_sync/bytes": maximum(num_bytes),
        "weight_sync/num_buckets": maximum(num_buckets),
    }
