"""The host of a rollout engine in a worker process; it decodes what the engine answers, so that
the controller need not decode the answers of all engines one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mcore_rl.cluster.placement import Place
from mcore_rl.data.chat import decode_response, load_tokenizer
from mcore_rl.metrics import Metrics, to_host
from mcore_rl.rollout import load_engine
from mcore_rl.rollout.base import EngineSpec, GenerationRequest, GenerationResult
from mcore_rl.types import RoutesAt
from mcore_rl.weight_sync.base import Link
from mcore_rl.weight_sync.export import WeightExporter
from mcore_rl.weight_sync.sync import sync_weights
from mcore_rl.workers.roles import Rollout
from mcore_rl.workers.routes import RouteStore, check_experts_differ, check_routes


class RolloutWorker(Rollout):
    """Owns one engine, or a part of one, and the sender that feeds it.

    Args:
        spec: what the engine starts from.
        place: of this process.
        exporter: of the actor's weights in this process.
        routes: of this process.
    """

    def __init__(
        self, spec: EngineSpec, place: Place, exporter: WeightExporter, routes: RouteStore
    ) -> None:
        self._is_first = place.engine_rank == 0
        self._exporter, self._routes, self._routing = exporter, routes, spec.routing
        self._knows_experts_differ = False
        self._bucket_bytes = spec.config.update_weights_bucket_mib << 20
        assert place.engine is not None
        link = Link(
            transport=spec.config.weight_transport,
            run_folder=spec.run_folder,
            engine=place.engine,
            engine_rank=place.engine_rank,
        )
        self._sender = link.open_sender()
        self.engine = load_engine(spec, link)
        self._tokenizer = load_tokenizer(spec.model_path) if spec.with_text else None

    def generate(
        self, requests: Sequence[GenerationRequest], keep_routes: bool
    ) -> list[GenerationResult]:
        """Return one result per request, in order; nothing on ranks but the engine's first.

        Every rank of the engine must be given the same requests.

        Raises:
            RolloutError: if routes are to be kept and the engine returns none, or impossible ones.
        """
        results = self.engine.generate(requests)
        if not self._is_first:
            return []
        if keep_routes:
            kept = [self._keep_routes(*pair) for pair in zip(requests, results, strict=True)]
            self._knows_experts_differ = True
        else:
            kept = [None] * len(results)
        return [
            replace(self._with_text(result), routed_experts=at)
            for result, at in zip(results, kept, strict=True)
        ]

    def _keep_routes(self, request: GenerationRequest, result: GenerationResult) -> RoutesAt:
        assert self._routing is not None, "the engine was not asked for routes"
        num_inputs = len(request.prompt_token_ids) + len(result.token_ids) - 1
        routes = check_routes(result.routed_experts, num_inputs, self._routing)
        if not self._knows_experts_differ:  # it does not change, and costs more than all the rest
            check_experts_differ(routes, self._routing)
        return self._routes.keep(routes)

    def _with_text(self, result: GenerationResult) -> GenerationResult:
        if self._tokenizer is None:
            return result
        return replace(result, text=decode_response(self._tokenizer, result.token_ids.tolist()))

    def sync_weights(self, version: int) -> Metrics:
        """Give this process's engine the actor's weights as `version`; collective."""
        buckets = self._exporter.buckets(self._bucket_bytes)
        return to_host(sync_weights(buckets, self._sender, self.engine, version))

    def close(self) -> None:
        """Free engine and sender."""
        self.engine.close()
        self._sender.close()
