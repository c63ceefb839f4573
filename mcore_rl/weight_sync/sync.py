"""One weight sync: export, senders, engines, in the order that vLLM's lifecycle asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import RunError, WeightSyncError
from mcore_rl.metrics import Metrics, maximum
from mcore_rl.weight_sync.base import NamedTensors, Sender, UpdateSession
from mcore_rl.weight_sync.digest import Manifest


@dataclass(slots=True)
class Target:
    """An engine that takes the weights, and the sender that feeds it."""

    sender: Sender[Any]
    session: UpdateSession
    problem: WeightSyncError | None = None
    """Why this target does not have the weights; None: it has them."""
    sends: bool = False
    """Whether the sender has begun a sync and not ended it."""


def sync_weights(
    export: Iterable[NamedTensors],
    targets: Sequence[Target],
    version: int,
    with_digests: bool = False,
    manifest: Manifest | None = None,
) -> Metrics:
    """Give every target the exported weights as `version` and return how much was moved.

    A target that fails, or got other weights than the exported ones, is skipped from then on, and
    its session is aborted; the export, which is collective, goes on. If the export fails, all are
    aborted.

    Args:
        export: buckets of full tensors.
        targets: their `problem` is set if they fail.
        version: of the weights.
        with_digests: as in `UpdateSession.start_weight_update`.
        manifest: empty; the exported tensors are added to it. None: not wanted.
    """
    num_buckets = num_bytes = 0
    is_read = bool(targets) or manifest is not None
    manifest = Manifest() if manifest is None else manifest
    try:
        for target in targets:
            _attempt(target, lambda t: t.session.start_weight_update(version, with_digests))
            _attempt(target, lambda t: _begin(t, version))
        for bucket in export:
            with manifest.adding(bucket if is_read else ()):
                for target in targets:
                    _attempt(target, lambda t, b=bucket: t.sender.send(b, t.session.update_weights))
            num_buckets += 1
            num_bytes += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
            del bucket  # before the next is made
        for target in targets:
            _attempt(target, lambda t: t.session.finish_weight_update(manifest))
            _attempt(target, _end)
            _attempt(target, lambda t: _check_version(t.session, version))
    except BaseException:
        for target in targets:
            if target.problem is None:
                _give_up(target)
        raise
    return {
        "weight_sync/bytes": maximum(num_bytes),
        "weight_sync/num_buckets": maximum(num_buckets),
    }


def sync_one(
    export: Iterable[NamedTensors],
    sender: Sender[Any],
    session: UpdateSession,
    version: int,
    with_digests: bool = False,
) -> Metrics:
    """Do `sync_weights` for one engine.

    Raises:
        WeightSyncError: if the engine did not get the weights.
    """
    target = Target(sender, session)
    metrics = sync_weights(export, [target], version, with_digests)
    if target.problem is not None:
        raise target.problem
    return metrics


def _attempt(target: Target, act: Callable[[Target], None]) -> None:
    if target.problem is not None:
        return
    try:
        act(target)
    except WeightSyncError as error:
        target.problem = error
        _give_up(target)


def _begin(target: Target, version: int) -> None:
    target.sends = True
    target.sender.begin(version)


def _end(target: Target) -> None:
    if target.sends:
        target.sends = False
        target.sender.end()


def _give_up(target: Target) -> None:
    _end(target)
    with contextlib.suppress(RunError):  # an engine that is gone needs no abort
        target.session.abort_weight_update()


def _check_version(session: UpdateSession, version: int) -> None:
    if session.weight_version != version:
        raise WeightSyncError(
            f"engine reports weights {session.weight_version} after a sync of {version}",
            role="rollout",
        )
