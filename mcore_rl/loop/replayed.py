"""A run done again from its journal: no engine generates, no reward is called.

The loop is the same as in the run. It asks for the same samples, since prompts, settings and seeds
are the same, and gets the answers that the run got. So it trains on the same tokens, with the
recorded log-probabilities and weight versions, also if the run had steps in flight.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.fleet import Fleet
from mcore_rl.errors import StoppedError, UserError
from mcore_rl.loop.inputs import RunInputs, Scorer
from mcore_rl.loop.journal import Key, Score, StepRecord, read_step, steps_of
from mcore_rl.metrics import Metrics
from mcore_rl.rewards.score import reward_metrics
from mcore_rl.rollout.base import GenerationRequest, GenerationResult
from mcore_rl.types import Ids, SampleGroup, with_sample_fields

logger = logging.getLogger(__name__)


class Playback:
    """Gives the recorded inputs of a run, step by step.

    Args:
        folder: of the journal.

    Raises:
        UserError: if it holds no step.
    """

    def __init__(self, folder: Path) -> None:
        steps = steps_of(folder)
        if not steps:
            raise UserError(f"{folder} holds no step: the run had trainer.journal=false, or none.")
        self._folder = folder
        self._answers: dict[Key, deque[GenerationResult]] = {}
        self._scores: deque[Score] = deque()
        self._step = -1
        self.last_step = steps[-1]
        """The last step in the journal."""

    def begin(self, step: int) -> StepRecord:
        """Move to a step and return its record.

        Raises:
            UserError: if the journal does not have the step, or lacks some of its inputs.
        """
        record = read_step(self._folder, step)
        if record.has_routes:
            raise UserError(
                f"{self._folder}: the run replayed routes of its engines "
                "(actor.router_replay.mode=R3), which a journal does not keep."
            )
        answers: dict[Key, deque[GenerationResult]] = defaultdict(deque)
        for key, result in record.answers:
            answers[key].append(result)
        self._step, self._answers, self._scores = step, answers, deque(record.scores)
        return record

    def answer(self, request: GenerationRequest) -> GenerationResult:
        """Return the engines' answer to a request in the step.

        Raises:
            UserError: if the run did not make this request.
        """
        left = self._answers.get(Key.of(request))
        if not left:
            raise UserError(
                f"step {self._step}: the run did not ask for a prompt of "
                f"{len(request.prompt_token_ids)} tokens with seed {request.sampling.seed}. Its "
                "data, data.seed or what a step draws was not as it is now."
            )
        return left.popleft()

    def score(self, uid: str, index: int) -> Score:
        """Return the reward's result for the next sample.

        Raises:
            UserError: if the run scored another sample.
        """
        score = self._scores.popleft() if self._scores else None
        if score is None or (score.uid, score.sample) != (uid, index):
            scored = "nothing" if score is None else f"sample {score.sample} of {score.uid}"
            raise UserError(
                f"step {self._step}: the run scored {scored} where sample {index} of {uid} is "
                "scored now. Its data or its code was not as it is now."
            )
        return score


def replayed(
    cluster: Cluster,
    inputs: RunInputs,
    playback: Playback,
    decode: Callable[[Ids], str],
    at_end: Callable[[], None],
) -> tuple[Cluster, RunInputs]:
    """Return a cluster without engines, and inputs, that give the recorded answers of a run; see
    `ReplayedEngines`."""
    engines = ReplayedEngines(cluster.engines, playback, decode, at_end)
    return replace(cluster, engines=engines), replace(inputs, scorer=ReplayedScorer(playback))


class ReplayedEngines(Fleet):
    """Engines that give the recorded answers of a run's engines.

    Args:
        source: a fleet without engines, which gets the trainer's weights.
        playback: of the run.
        decode: returns the text of response tokens, as the engine's host does.
        at_end: called when the trainer reaches the weights of a step that the journal lacks.
    """

    def __init__(
        self,
        source: Fleet,
        playback: Playback,
        decode: Callable[[Ids], str],
        at_end: Callable[[], None],
    ) -> None:
        self._source, self._playback = source, playback
        self._decode, self._at_end = decode, at_end
        self._is_interrupted = False

    @property
    def num_engines(self) -> int:
        """See `Fleet`."""
        return 1

    @property
    def num_restarts(self) -> int:
        """See `Fleet`; none is started."""
        return 0

    @property
    def weights(self) -> Mapping[str, str]:
        """See `Fleet`."""
        return self._source.weights

    def begin(
        self, groups: Sequence[Sequence[GenerationRequest]], *, keep_routes: bool = False
    ) -> Any:
        """See `Fleet`."""
        if self._is_interrupted:
            raise StoppedError
        return groups

    def end(self, generation: Any, enough: int | None = None) -> list[list[GenerationResult]]:
        """See `Fleet`; samples that were stopped in the run have ended by "abort" in the journal.

        Raises:
            UserError: if the run did not make these requests.
        """
        return [[self._answer(request) for request in group] for group in generation]

    def _answer(self, request: GenerationRequest) -> GenerationResult:
        result = self._playback.answer(request)
        return replace(result, text=self._decode(result.token_ids))

    def sync_weights(self, version: int) -> Metrics:
        """See `Fleet`; logs a message when the weights are not those of the run."""
        metrics = self._source.sync_weights(version)
        if version > self._playback.last_step:
            self._at_end()
            return metrics
        wanted = self._playback.begin(version).weights
        other = [name for name in self.weights if wanted.get(name) != self.weights[name]]
        if other:
            message = "weights %d are not those of the run: %s differs, first of %d"
            logger.warning(message, version, other[0], len(other))
        return metrics

    def sync_and_compare(
        self, version: int, wanted: Sequence[Mapping[str, str]] | None = None
    ) -> int:
        """See `Fleet`; there is nothing to compare with."""
        self.sync_weights(version)
        return len(self.weights)

    def digests_of_model(self) -> list[dict[str, str]]:
        """See `Fleet`; no engine loads anything."""
        return []

    def busy_share(self) -> float:
        """See `Fleet`."""
        return 0.0

    def interrupt(self) -> None:
        """See `Fleet`."""
        self._is_interrupted = True


class ReplayedScorer(Scorer):
    """Rewards that give the recorded results of a run's rewards.

    Args:
        playback: of the run.
    """

    def __init__(self, playback: Playback) -> None:
        self._playback = playback

    def score(self, groups: Sequence[SampleGroup]) -> tuple[list[SampleGroup], Metrics]:
        """See `Scorer`.

        Raises:
            UserError: if the run scored other samples.
        """
        samples = [sample for group in groups for sample in group.samples]
        scores = [self._playback.score(sample.prompt.uid, sample.index) for sample in samples]
        if not scores:
            return list(groups), reward_metrics(groups)
        scored = with_sample_fields(
            groups,
            reward=[score.reward for score in scores],
            reward_status=[score.status for score in scores],
            reward_metrics=[score.metrics for score in scores],
            answer=[score.answer for score in scores],
        )
        return scored, reward_metrics(scored)

    def check_failures(self, groups: Sequence[SampleGroup]) -> None:
        """See `Scorer`; the run went on."""

    def interrupt(self) -> None:
        """See `Scorer`; nothing takes long."""
