"""How the routes of sequences get to the ranks that replay them: from worker to worker.

An engine, or a pass that records, leaves the routes in its own worker and tells the controller
where they are (`RoutesAt`). Before a pass that replays, the workers that hold routes of a share
send them to the rank that receives the share. The controller sees only a few numbers for each
sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mcore_rl.cluster.group import WorkerGroup, call, call_all, results
from mcore_rl.cluster.placement import Placement
from mcore_rl.types import Share
from mcore_rl.workers.roles import RouteHolder


class Routes:
    """What the controller knows of the routes that workers hold.

    Args:
        workers: running workers.
        placement: where they stand.
    """

    def __init__(self, workers: WorkerGroup, placement: Placement) -> None:
        self._workers, self._placement = workers, placement
        self._are_held = False
        self._given: set[tuple[int, int, int]] = set()
        """(rank that holds routes, their key, rank that received them)."""

    def expect(self) -> None:
        """Take note that workers hold routes from now on."""
        self._are_held = True

    def deliver(self, shares: Sequence[Share]) -> None:
        """Send the routes of every share to the first of the ranks that work on it.

        They are sent once, for any number of passes.
        """
        gives: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        takes: dict[int, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for (first, *_), share in zip(self._placement.share_ranks, shares, strict=True):
            if share.whole.routes_at is None:
                continue
            num_inputs = (share.whole.lengths - 1).tolist()
            for (rank, key), rows in zip(share.whole.routes_at.tolist(), num_inputs, strict=True):
                if rank != first and (rank, key, first) not in self._given:
                    self._given.add((rank, key, first))
                    gives[rank][first].append(key)
                    takes[first][rank].append((key, rows))
        calls = {
            rank: call(
                RouteHolder.exchange,
                {other: np.array(keys) for other, keys in gives[rank].items()},
                {other: np.array(of_other) for other, of_other in takes[rank].items()},
            )
            for rank in sorted(gives.keys() | takes.keys())
        }
        if calls:
            results(self._workers.submit(calls))

    def drop(self) -> None:
        """Make all workers drop all routes."""
        if self._are_held:
            call_all(self._workers, RouteHolder.drop)
        self._are_held = False
        self._given.clear()
