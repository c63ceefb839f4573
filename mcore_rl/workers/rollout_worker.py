"""Does the calls of a rollout engine. It also decodes the engine's answers, so that the controller
need not decode the answers of all engines one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from mcore_rl import interruption
from mcore_rl.data.chat import decode_response, load_tokenizer
from mcore_rl.rollout.base import (
    EnginePart,
    EngineSpec,
    GenerationRequest,
    GenerationResult,
    PauseMode,
)
from mcore_rl.rollout.serving import Health, ServingEngine
from mcore_rl.types import RoutesAt
from mcore_rl.workers.roles import Rollout
from mcore_rl.workers.routes import RouteStore, check_experts_differ, check_routes

T = TypeVar("T")
R = TypeVar("R")
_Given = tuple[Future[list[GenerationResult]], Future[list[GenerationResult]]]
"""Futures of a group: the engine's results, and the answer made from them."""


class RolloutWorker(Rollout):
    """Owns one engine, or a part of one.

    Args:
        spec: what the engine starts from.
        engine: without weights.
        is_first: whether it answers for the engine.
        routes: of this process; None if none are kept.
    """

    def __init__(
        self, spec: EngineSpec, engine: ServingEngine, is_first: bool, routes: RouteStore | None
    ) -> None:
        self.engine, self._is_first = engine, is_first
        self._routes, self._routing = routes, spec.routing
        self._model_path = spec.model_path
        self._knows_experts_differ = False
        self._given: dict[int, dict[int, _Given]] = {}
        """Groups that are not answered yet, by number of the call and of the group; on the first
        rank."""
        self._tokenizer = load_tokenizer(spec.model_path) if spec.with_text else None

    def generate(
        self, number: int, groups: Sequence[Sequence[GenerationRequest]], keep_routes: bool
    ) -> None:
        """See `Rollout`."""
        drawn = self.engine.submit(groups)
        if not self._is_first:
            for of_group in drawn:
                of_group.result()  # nobody asks for the answer, but an error must be raised
            return
        self._given[number] = {
            group: (of_group, self._answer(requests, of_group, keep_routes))
            for group, (requests, of_group) in enumerate(zip(groups, drawn, strict=True))
        }

    def answer(self, number: int, group: int) -> Future[list[GenerationResult]]:
        """See `Rollout`.

        Raises:
            RolloutError: if routes are to be kept and the engine returns none, or impossible ones.
        """
        _, answer = self._given[number][group]
        answer.add_done_callback(lambda _: self._forget(number, group))
        return answer

    def stop(self, number: int) -> None:
        """See `Rollout`."""
        for drawn, _ in list(self._given.get(number, {}).values()):
            self.engine.abort(drawn)

    def _forget(self, number: int, group: int) -> None:
        """Drop an answer that is being sent; with the last one, drop the call."""
        of_call = self._given[number]
        del of_call[group]
        if not of_call:
            del self._given[number]

    def _answer(
        self,
        requests: Sequence[GenerationRequest],
        drawn: Future[list[GenerationResult]],
        keep_routes: bool,
    ) -> Future[list[GenerationResult]]:
        """Return a future of the results as they are answered."""

        def answer(results: list[GenerationResult]) -> list[GenerationResult]:
            if interruption.is_asked():
                return []
            kept: list[RoutesAt | None] = [None] * len(results)
            if keep_routes:
                kept = [self._keep_routes(*pair) for pair in zip(requests, results, strict=True)]
                self._knows_experts_differ = True
            return [
                replace(self._with_text(result), routed_experts=at)
                for result, at in zip(results, kept, strict=True)
            ]

        return _then(drawn, answer)

    def _keep_routes(self, request: GenerationRequest, result: GenerationResult) -> RoutesAt:
        assert self._routing is not None, "the engine was not asked for routes"
        assert self._routes is not None, "routes are kept in train workers"
        num_inputs = len(request.prompt_token_ids) + len(result.token_ids) - 1
        routes = check_routes(result.routed_experts, num_inputs, self._routing)
        if not self._knows_experts_differ:  # it does not change, and costs more than all the rest
            check_experts_differ(routes, self._routing)
        return self._routes.keep(routes)

    def _with_text(self, result: GenerationResult) -> GenerationResult:
        if self._tokenizer is None:
            return result
        return replace(result, text=decode_response(self._tokenizer, result.token_ids.tolist()))

    def pause(self, mode: PauseMode) -> None:
        """See `Rollout`."""
        self.engine.pause(mode)

    def resume(self) -> None:
        """See `Rollout`."""
        self.engine.resume()

    def sleep(self, level: int) -> None:
        """See `Rollout`."""
        self.engine.sleep(level)

    def wake(self, part: EnginePart) -> None:
        """See `Rollout`."""
        self.engine.wake(part)

    def health(self) -> Health:
        """See `Rollout`."""
        return self.engine.health()

    def loaded_digests(self) -> list[dict[str, str]]:
        """See `Rollout`."""
        return self.engine.loaded_digests()

    def digests_of_model(self) -> list[dict[str, str]]:
        """See `Rollout`."""
        return self.engine.digests_of_folder(self._model_path)

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()


def _then(future: Future[T], answer: Callable[[T], R]) -> Future[R]:
    """Return a future of `answer` applied to the result of another future."""
    made: Future[R] = Future()

    def make(done: Future[T]) -> None:
        try:
            made.set_result(answer(done.result()))
        except Exception as error:  # noqa: BLE001  it is the answer
            made.set_exception(error)

    future.add_done_callback(make)
    return made
