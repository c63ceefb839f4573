"""One weight sync: export, senders, engines, in the order that vLLM's lifecycle asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import WeightSyncError
from mcore_rl.metrics import Metrics, maximum
from mcore_rl.weight_sync.base import NamedTensors, Sender, UpdateSession


@dataclass(slots=True)
class Target:
    """An engine that takes the weights, and the sender that feeds it."""

    sender: Sender[Any]
    session: UpdateSession
    problem: WeightSyncError | None = None
    """Why it does not have them; the others do."""


def sync_weights(
    export: Iterable[NamedTensors], targets: Sequence[Target], version: int
) -> Metrics:
    """Give every target the exported weights as `version` and return how much was moved.

    A target that fails is left out from there on; the export, which others take part in, goes on.
    """
    num_buckets = num_bytes = 0
    for target in targets:
        _attempt(target, lambda t: t.session.start_weight_update(version))
        _attempt(target, lambda t: t.sender.begin(version))
    for bucket in export:
        for target in targets:
            _attempt(target, lambda t, b=bucket: t.sender.send(b, t.session.update_weights))
        num_buckets += 1
        num_bytes += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
    for target in targets:
        _attempt(target, lambda t: t.session.finish_weight_update())
        target.sender.end()
        _attempt(target, lambda t: _check_version(t.session, version))
    return {
        "weight_sync/bytes": maximum(num_bytes),
        "weight_sync/num_buckets": maximum(num_buckets),
    }


def _attempt(target: Target, act: Callable[[Target], None]) -> None:
    if target.problem is not None:
        return
    try:
        act(target)
    except WeightSyncError as error:
        target.problem = error


def _check_version(session: UpdateSession, version: int) -> None:
    if session.weight_version != version:
        raise WeightSyncError(
            f"engine reports weights {session.weight_version} after a sync of {version}",
            role="rollout",
        )
