"""The fleet of rollout engines: requests go out to all of them, results come back in order."""

from __future__ import annotations

from collections.abc import Sequence

from mcore_rl.cluster.group import WorkerGroup, call, call_all, results
from mcore_rl.cluster.placement import Placement
from mcore_rl.cluster.routes import Routes
from mcore_rl.metrics import Metrics, merge
from mcore_rl.rollout.base import GenerationRequest, GenerationResult
from mcore_rl.workers.roles import Rollout


class Engines:
    """All engines of a run; for now inside the train workers.

    Args:
        workers: running workers.
        placement: where they stand.
        routes: what is known of the routes that they hold.
    """

    def __init__(self, workers: WorkerGroup, placement: Placement, routes: Routes) -> None:
        self._workers, self._routes = workers, routes
        self._ranks = placement.engine_ranks

    @property
    def num_engines(self) -> int:
        return len(self._ranks)

    def generate(
        self, requests: Sequence[GenerationRequest], *, keep_routes: bool = False
    ) -> list[GenerationResult]:
        """Return one result per request, in order, generated on all engines.

        Requests are dealt out one by one, so that neighbours (samples of one prompt, likely of
        the same length) spread over the engines. All ranks of an engine get the same. Routes, if
        they are kept, lie where they were recorded.
        """
        if keep_routes:
            self._routes.expect()
        calls = {}
        for number, ranks in enumerate(self._ranks):
            share = call(Rollout.generate, requests[number :: self.num_engines], keep_routes)
            calls |= dict.fromkeys(ranks, share)
        by_rank = results(self._workers.submit(calls))
        answers = [iter(by_rank[ranks[0]]) for ranks in self._ranks]
        return [next(answers[number % self.num_engines]) for number in range(len(requests))]

    def sync_weights(self, version: int) -> Metrics:
        """Give every engine the actor's weights as `version`."""
        return merge(call_all(self._workers, Rollout.sync_weights, version))
