"""An engine as its host uses it: which calls are allowed when, and who gets which result.

    without weights --start--> taking weights --finish--> ready --generate--> results
    ready --pause--> paused (weights may be taken while requests wait) --resume--> ready
    ready --sleep--> asleep (requests wait, weights may be taken) --wake--> ready (level 2: without
    weights)

Calls that the state does not allow are refused. An update that breaks off leaves an engine without
weights, which generates nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from mcore_rl import interruption, progress
from mcore_rl.errors import RolloutError
from mcore_rl.rollout.base import (
    EnginePart,
    GenerationRequest,
    GenerationResult,
    PauseMode,
    RolloutEngine,
)
from mcore_rl.weight_sync.digest import Manifest

STEPS_BETWEEN_POLLS = 16
"""After so many steps the ranks agree again on whether the generation is still wanted."""


@dataclass(frozen=True, slots=True)
class Health:
    """State of an engine."""

    weight_version: int
    """-1: it has no complete weights."""
    num_unfinished: int
    """Requests."""
    is_paused: bool
    asleep: frozenset[EnginePart]


@dataclass(slots=True, eq=False)
class _Batch:
    """The requests of a group, and their results so far."""

    results: list[GenerationResult | None]
    num_open: int
    future: Future[list[GenerationResult]] = field(default_factory=Future)

    def put(self, place: int, result: GenerationResult) -> None:
        self.results[place] = result
        self.num_open -= 1
        if self.num_open == 0 and not self.future.done():
            self.future.set_result([result for result in self.results if result is not None])


class ServingEngine:
    """An engine that refuses what its state does not allow.

    Args:
        engine: without weights.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._unfinished: dict[int, tuple[_Batch, int]] = {}
        """Batch of each request and its position in it, by number of the request."""
        self._num_steps = 0
        self._is_open = self._is_paused = self._has_failed = False
        self._asleep: frozenset[EnginePart] = frozenset()

    @property
    def weight_version(self) -> int:
        """Version of the weights; -1 without complete ones."""
        return self._engine.weight_version

    @property
    def is_busy(self) -> bool:
        """Whether `run` has something to do."""
        return bool(self._unfinished) and not self._is_paused and not self._asleep

    def health(self) -> Health:
        """Return the state of the engine."""
        return Health(
            weight_version=self.weight_version,
            num_unfinished=len(self._unfinished),
            is_paused=self._is_paused,
            asleep=self._asleep,
        )

    def submit(
        self, groups: Sequence[Sequence[GenerationRequest]]
    ) -> list[Future[list[GenerationResult]]]:
        """Take requests; the future of a group has one result per request, in order, after enough
        `run`s.

        Raises:
            RolloutError: if the engine may not generate.
        """
        self._refuse_if(self._has_failed, "generate", "has failed")
        self._refuse_if(self._is_open, "generate", "is taking weights")
        self._refuse_if(bool(self._asleep), "generate", "is asleep")
        self._refuse_if(self.weight_version < 0, "generate", "has no complete weights")
        return [self._add(requests) for requests in groups]

    def _add(self, requests: Sequence[GenerationRequest]) -> Future[list[GenerationResult]]:
        batch = _Batch([None] * len(requests), len(requests))
        if not requests:
            batch.future.set_result([])
        for place, request in enumerate(requests):
            number = next(self._numbers)
            self._unfinished[number] = batch, place
            self._engine.add(number, request)
        return batch.future

    def run(self) -> None:
        """Do one step, and return the results that have ended with it. An error is the answer to
        all unfinished requests, which are dropped. If the requests are no longer wanted, end them
        with their tokens so far."""
        progress.tick()
        try:
            if self._is_interrupted():
                self._hand_out(self._engine.abort(list(self._unfinished)))
            else:
                self._hand_out(self._engine.step())
        except Exception as error:  # noqa: BLE001  an engine's library may raise anything
            batches = {id(batch): batch for batch, _ in self._unfinished.values()}
            self._unfinished.clear()
            self._has_failed = True
            for batch in batches.values():
                batch.future.set_exception(error)

    def _is_interrupted(self) -> bool:
        self._num_steps += 1
        is_time = self._num_steps % STEPS_BETWEEN_POLLS == 0
        return is_time and self._engine.any_rank(interruption.is_asked())

    def abort(self, future: Future[list[GenerationResult]]) -> None:
        """End the unfinished requests of a batch with their tokens so far."""
        numbers = [n for n, (batch, _) in self._unfinished.items() if batch.future is future]
        self._hand_out(self._engine.abort(numbers))

    def pause(self, mode: PauseMode) -> None:
        """Draw no token from here on; see `PauseMode`."""
        self._refuse_if(self._is_paused, "pause", "is paused already")
        self._refuse_if(bool(self._asleep), "pause", "is asleep")
        if mode is PauseMode.ABORT:
            self._hand_out(self._engine.abort(list(self._unfinished)))
        while mode is PauseMode.WAIT and self._unfinished:
            self.run()
        self._is_paused = True

    def resume(self) -> None:
        """End a pause."""
        self._refuse_if(not self._is_paused, "resume", "is not paused")
        self._refuse_if(self._is_open, "resume", "is taking weights")
        self._refuse_if(self.weight_version < 0, "resume", "has no complete weights")
        self._is_paused = False

    def sleep(self, level: int) -> None:
        """Free the device's memory; see `RolloutEngine.sleep`. Unfinished requests wait."""
        self._refuse_if(self._is_open, "sleep", "is taking weights")
        self._refuse_if(self._asleep == frozenset(EnginePart), "sleep", "is asleep already")
        self._engine.sleep(level)
        self._asleep = frozenset(EnginePart)

    def wake(self, part: EnginePart) -> None:
        """Allocate the memory of a part again."""
        self._refuse_if(part not in self._asleep, "wake", f"has its {part.value} awake")
        self._engine.wake(part)
        self._asleep -= {part}

    def start_weight_update(self, version: int, with_digests: bool = False) -> None:
        """See `UpdateSession`. Requests that are running need a pause first."""
        self._refuse_if(self._is_open, "start_weight_update", "is taking weights already")
        self._refuse_if(EnginePart.WEIGHTS in self._asleep, "start_weight_update", "is asleep")
        self._refuse_if(self.is_busy, "start_weight_update", "has requests and no pause")
        self._is_open = True
        self._engine.start_weight_update(version, with_digests)

    def update_weights(self, update: Any) -> None:
        """See `UpdateSession`."""
        self._refuse_if(not self._is_open, "update_weights", "is not taking weights")
        progress.tick()
        self._engine.update_weights(update)

    def finish_weight_update(self, manifest: Manifest) -> None:
        """See `UpdateSession`."""
        self._refuse_if(not self._is_open, "finish_weight_update", "is not taking weights")
        self._engine.finish_weight_update(manifest)
        self._is_open = False

    def abort_weight_update(self) -> None:
        """See `UpdateSession`."""
        if self._is_open:
            self._is_open = False
            self._engine.abort_weight_update()

    def loaded_digests(self) -> list[dict[str, str]]:
        """See `RolloutEngine`."""
        return self._engine.loaded_digests()

    def digests_of_folder(self, folder: str) -> list[dict[str, str]]:
        """See `RolloutEngine`."""
        self._refuse_if(self._is_open, "digests_of_folder", "is taking weights")
        self._refuse_if(EnginePart.WEIGHTS in self._asleep, "digests_of_folder", "is asleep")
        self._refuse_if(bool(self._unfinished), "digests_of_folder", "has unfinished requests")
        return self._engine.digests_of_folder(folder)

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def _hand_out(self, ended: Iterable[tuple[int, GenerationResult]]) -> None:
        for number, result in ended:
            batch, place = self._unfinished.pop(number)
            batch.put(place, result)

    def _refuse_if(self, holds: bool, asked: str, reason: str) -> None:
        if holds:
            raise RolloutError(f"{asked} was asked of an engine that {reason}", role="rollout")
