"""A run that keeps a journal: engines and rewards whose answers are recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.fleet import Fleet
from mcore_rl.loop.inputs import RunInputs, Scorer
from mcore_rl.loop.journal import Key, Score, StepRecord, drop_from, write_step
from mcore_rl.metrics import Metrics
from mcore_rl.rollout.base import GenerationRequest, GenerationResult
from mcore_rl.types import SampleGroup


class Journal:
    """Records the current step, and writes the record when the step is over.

    Args:
        folder: of the journal; made with the first file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._step = -1
        self._record: StepRecord | None = None

    def synced(self, version: int, weights: Mapping[str, str]) -> None:
        """Take note that the engines have new weights, which ends a step and begins the next; the
        first weights begin the first step of the run.

        Raises:
            RunError: if the step cannot be written.
        """
        if self._record is None:
            drop_from(self._folder, version)
        self.close()
        self._step, self._record = version, StepRecord(weights)

    def answered(
        self,
        requests: Sequence[Sequence[GenerationRequest]],
        results: Sequence[Sequence[GenerationResult]],
        has_routes: bool,
    ) -> None:
        """Record the answers of the engines."""
        record = self._going_on
        if has_routes:
            self._record = record = StepRecord(record.weights, record.answers, record.scores, True)
        for of_group, answers in zip(requests, results, strict=True):
            record.answers.extend(zip(map(Key.of, of_group), answers, strict=True))

    def scored(self, groups: Sequence[SampleGroup]) -> None:
        """Record the results of the rewards."""
        self._going_on.scores.extend(
            Score(s.prompt.uid, s.index, s.reward, s.reward_status, s.reward_metrics, s.answer)
            for group in groups
            for s in group.samples
        )

    def close(self) -> None:
        """Write the current step, for example the validation after the last step."""
        if self._record is not None:
            write_step(self._folder, self._step, self._record)

    @property
    def _going_on(self) -> StepRecord:
        assert self._record is not None, "nothing is generated or scored before the first sync"
        return self._record


def recorded(cluster: Cluster, inputs: RunInputs, journal: Journal) -> tuple[Cluster, RunInputs]:
    """Return a cluster and inputs that do the same and record in a journal."""
    return (
        replace(cluster, engines=RecordedEngines(cluster.engines, journal)),
        replace(inputs, scorer=RecordedScorer(inputs.scorer, journal)),
    )


@dataclass(frozen=True, slots=True)
class _Begun:
    """A generation that was given to the engines."""

    requests: Sequence[Sequence[GenerationRequest]]
    keep_routes: bool
    generation: Any


class RecordedEngines(Fleet):
    """Engines whose answers are recorded in a journal.

    Args:
        engines: give the answers.
        journal: records them.
    """

    def __init__(self, engines: Fleet, journal: Journal) -> None:
        self._engines, self._journal = engines, journal

    @property
    def num_engines(self) -> int:
        """See `Fleet`."""
        return self._engines.num_engines

    @property
    def num_restarts(self) -> int:
        """See `Fleet`."""
        return self._engines.num_restarts

    @property
    def weights(self) -> Mapping[str, str]:
        """See `Fleet`."""
        return self._engines.weights

    def begin(
        self, groups: Sequence[Sequence[GenerationRequest]], *, keep_routes: bool = False
    ) -> _Begun:
        """See `Fleet`."""
        return _Begun(groups, keep_routes, self._engines.begin(groups, keep_routes=keep_routes))

    def end(self, generation: _Begun, enough: int | None = None) -> list[list[GenerationResult]]:
        """See `Fleet`."""
        results = self._engines.end(generation.generation, enough)
        self._journal.answered(generation.requests, results, generation.keep_routes)
        return results

    def sync_weights(self, version: int) -> Metrics:
        """See `Fleet`."""
        metrics = self._engines.sync_weights(version)
        self._journal.synced(version, self._engines.weights)
        return metrics

    def sync_and_compare(
        self, version: int, wanted: Sequence[Mapping[str, str]] | None = None
    ) -> int:
        """See `Fleet`."""
        num = self._engines.sync_and_compare(version, wanted)
        self._journal.synced(version, self._engines.weights)
        return num

    def digests_of_model(self) -> list[dict[str, str]]:
        """See `Fleet`."""
        return self._engines.digests_of_model()

    def busy_share(self) -> float:
        """See `Fleet`."""
        return self._engines.busy_share()

    def interrupt(self) -> None:
        """See `Fleet`."""
        self._engines.interrupt()


class RecordedScorer(Scorer):
    """Rewards whose results are recorded in a journal.

    Args:
        scorer: gives the results.
        journal: records them.
    """

    def __init__(self, scorer: Scorer, journal: Journal) -> None:
        self._scorer, self._journal = scorer, journal

    def score(self, groups: Sequence[SampleGroup]) -> tuple[list[SampleGroup], Metrics]:
        """See `Scorer`."""
        scored, metrics = self._scorer.score(groups)
        self._journal.scored(scored)
        return scored, metrics

    def check_failures(self, groups: Sequence[SampleGroup]) -> None:
        """See `Scorer`."""
        self._scorer.check_failures(groups)

    def interrupt(self) -> None:
        """See `Scorer`."""
        self._scorer.interrupt()
