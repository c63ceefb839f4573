"""A cluster whose engines and trainer take seconds of a clock that nobody waits for.

Behind the `WorkerGroup` protocol: a trainer of one rank that trains nothing, and engines in
processes of their own, each a real `ServingEngine` that draws token by token. The controller, which
is the thread of the test, takes no time: while it waits for an answer the clock goes from event to
event until the answer is there.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.group import Call
from mcore_rl.cluster.placement import engines_apart
from mcore_rl.config.run import RunConfig
from mcore_rl.metrics import maximum
from mcore_rl.rewards.pool import Outcome
from mcore_rl.rewards.score import RewardScorer, reward_metrics, with_outcomes
from mcore_rl.rollout.base import GenerationRequest, GenerationResult
from mcore_rl.rollout.serving import ServingEngine
from mcore_rl.sockets import Address
from mcore_rl.types import Layout, TokenNumbers, VersionSpan, WriteState
from mcore_rl.workers.roles import (
    Actor,
    EngineProcess,
    Memory,
    Rollout,
    SentWeights,
    WeightSource,
)
from tests.carriers import make_result

TRAINER = 0
"""Its rank; engines follow."""


class Clock:
    """Seconds, and what happens when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something happen in so many seconds; of one moment, what was asked for first."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), action))

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Let time pass until the condition holds."""
        while not is_over():
            self.now, _, action = heapq.heappop(self._events)
            action()

    def sleep(self, seconds: float) -> None:
        """Let so many seconds pass."""
        over: list[bool] = []
        self.after(seconds, lambda: over.append(True))
        self.run_until(lambda: bool(over))


class Answer(Future):
    """A future of which whoever waits for it lets time pass."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def result(self, timeout: float | None = None) -> Any:
        self._clock.run_until(self.done)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._clock.run_until(self.done)
        return super().exception(timeout)


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """What takes how long, in seconds."""

    token: float
    """A token of every running request."""
    update: float
    sync: float
    logprobs: float = 0.0
    reward: float = 0.0
    computed_token: float = 0.0
    """A token that an engine computes again after a sync."""


@dataclass
class _Drawn:
    """A response that is being drawn."""

    num_wanted: int
    spans: list[VersionSpan] = field(default_factory=list)

    @property
    def num(self) -> int:
        return self.spans[-1].end if self.spans else 0

    def draw(self, version: int) -> None:
        if self.spans and self.spans[-1].version == version:
            self.spans[-1] = VersionSpan(version, self.spans[-1].start, self.num + 1)
        else:
            self.spans.append(VersionSpan(version, self.num, self.num + 1))


class TokenEngine:
    """A `RolloutEngine` that draws a token of each of its first requests in a step.

    Args:
        slots: how many these are at most.
        length_of: tokens of the response, by the seed of its request.
    """

    def __init__(self, slots: int, length_of: Callable[[int], int]) -> None:
        self._slots, self._length_of = slots, length_of
        self._requests: dict[int, _Drawn] = {}
        self.weight_version = -1

    def length(self, request: GenerationRequest) -> int:
        """Return the tokens of its response."""
        return min(self._length_of(request.sampling.seed), request.sampling.max_tokens)

    @property
    def num_computed(self) -> int:
        """Tokens of unfinished responses."""
        return sum(drawn.num for drawn in self._requests.values())

    def add(self, number: int, request: GenerationRequest) -> None:
        self._requests[number] = _Drawn(self.length(request))

    def step(self) -> list[tuple[int, GenerationResult]]:
        running = list(itertools.islice(self._requests.items(), self._slots))
        for _, drawn in running:
            drawn.draw(self.weight_version)
        ended = [number for number, drawn in running if drawn.num == drawn.num_wanted]
        return [(number, self._result(self._requests.pop(number))) for number in ended]

    def _result(self, drawn: _Drawn) -> GenerationResult:
        return make_result(
            token_ids=np.ones(drawn.num),
            logprobs=np.zeros(drawn.num),
            finish_reason="stop",
            versions=drawn.spans,
        )

    def any_rank(self, is_so: bool) -> bool:
        return is_so

    def start_weight_update(self, version: int, with_digests: bool = False) -> None:
        self.weight_version, self._coming = -1, version

    def finish_weight_update(self, manifest: Any) -> None:
        self.weight_version = self._coming


class VirtualEngine:
    """The process of an engine: draws while it has requests, and takes calls between two steps.

    Args:
        clock: of the run.
        engine: in it.
        latencies: of a step.
    """

    def __init__(self, clock: Clock, engine: TokenEngine, latencies: Latencies) -> None:
        self._clock, self._engine, self._latencies = clock, engine, latencies
        served: Any = engine  # it lacks what nobody asks for here
        self._serving = ServingEngine(served)
        self._is_drawing = False
        self._calls: list[tuple[Callable[[], Any], Answer]] = []
        self._catching_up = 0.0
        self._given: dict[tuple[int, int], Future[list[GenerationResult]]] = {}
        """By number of a call and of a group."""
        self.batches: list[list[int]] = []
        """Tokens of each response, by call."""
        self._busy: list[tuple[float, float]] = []
        """When there were requests."""
        self._given_at = 0.0

    def busy_s(self, since: float) -> float:
        """Return for how many seconds there were requests that were given after a moment."""
        return sum(end - start for start, end in self._busy if start >= since)

    def take_call(self, call: Call[Any]) -> Answer:
        answer = Answer(self._clock)
        match call.method:
            case Rollout.generate:
                number, groups, _ = call.args
                self._give(number, groups)
                answer.set_result(None)
            case Rollout.answer:
                submitted = self._given.pop(call.args)
                submitted.add_done_callback(lambda done: answer.set_result(done.result()))
            case Rollout.pause:
                self._between_steps(partial(self._serving.pause, *call.args), answer)
            case Rollout.resume:
                self._between_steps(self._serving.resume, answer)
            case EngineProcess.receive_weights:
                take = partial(self._take_weights, *call.args)
                self._clock.after(self._latencies.sync, lambda: self._between_steps(take, answer))
            case _:
                raise AssertionError(f"an engine was asked for {call.name}")
        return answer

    def _give(self, number: int, groups: Sequence[Sequence[GenerationRequest]]) -> None:
        self.batches.append([self._engine.length(request) for of in groups for request in of])
        if not self._serving.health().num_unfinished:
            self._given_at = self._clock.now
        for group, submitted in enumerate(self._serving.submit(groups)):
            self._given[number, group] = submitted
        self._go_on()

    def _take_weights(self, version: int) -> None:
        self._serving.start_weight_update(version)
        self._serving.finish_weight_update(None)  # type: ignore[arg-type]
        self._catching_up = self._engine.num_computed * self._latencies.computed_token

    def _between_steps(self, action: Callable[[], Any], answer: Answer) -> None:
        self._calls.append((action, answer))
        if not self._is_drawing:
            self._do_calls()
            self._go_on()

    def _do_calls(self) -> None:
        for action, answer in self._calls:
            answer.set_result(action())
        self._calls.clear()

    def _go_on(self) -> None:
        if self._is_drawing or not self._serving.is_busy:
            return
        self._is_drawing = True
        self._clock.after(self._latencies.token + self._catching_up, self._drawn)
        self._catching_up = 0.0

    def _drawn(self) -> None:
        self._is_drawing = False
        self._serving.run()
        if not self._serving.health().num_unfinished:
            self._busy.append((self._given_at, self._clock.now))
        self._do_calls()
        self._go_on()


class VirtualWorkers:
    """A `WorkerGroup` of a trainer and engines.

    Args:
        clock: of the run.
        latencies: of what they do.
        engines: by number.
    """

    world_size = 1

    def __init__(
        self, clock: Clock, latencies: Latencies, engines: Sequence[VirtualEngine]
    ) -> None:
        self._clock, self._latencies, self.engines = clock, latencies, engines
        self._step: int | None = None
        self.step_began: list[float] = []

    @property
    def step(self) -> int | None:
        return self._step

    @step.setter
    def step(self, step: int | None) -> None:
        self._step = step
        self.step_began.append(self._clock.now)

    def submit(self, calls: Mapping[int, Call[Any]]) -> dict[int, Answer]:
        return {
            rank: self._trainer(call) if rank == TRAINER else self.engines[rank - 1].take_call(call)
            for rank, call in calls.items()
        }

    def _trainer(self, call: Call[Any]) -> Answer:
        answer = Answer(self._clock)
        seconds, value = self._work(call)
        self._clock.after(seconds, lambda: answer.set_result(value))
        return answer

    def _work(self, call: Call[Any]) -> tuple[float, Any]:
        """Return what a call to the trainer takes and gives."""
        match call.method:
            case Actor.logprobs:
                (share,) = call.args
                lengths = np.concatenate([mb.lengths for mb in share])
                numbers = TokenNumbers(
                    indices=np.concatenate([mb.indices for mb in share]),
                    lengths=lengths,
                    numbers=np.zeros(lengths.sum(), np.float32),
                )
                return self._latencies.logprobs, numbers
            case Actor.update:
                return self._latencies.update, {"actor/grad_norm": maximum(1.0)}
            case WeightSource.send_weights:
                return self._latencies.sync, SentWeights({}, {})
            case Actor.save_state:
                return 0.0, WriteState(is_done=True)
            case Actor.begin_step | Actor.begin_save | Actor.finish_save | Memory.take_peak:
                return 0.0, None
            case _:
                raise AssertionError(f"the trainer was asked for {call.name}")

    def update_address(self, rank: int) -> Address:
        return Address("", b"")

    def restart(self, rank: int) -> Future[None]:
        raise AssertionError("no engine fails")

    def interrupt(self) -> None:
        raise AssertionError("nobody ends the run")

    def close(self) -> None:
        raise AssertionError("a loop leaves its workers to whoever started them")


class VirtualScorer(RewardScorer):
    """Scores after so many seconds."""

    def __init__(self, cfg: RunConfig, clock: Clock, seconds: float) -> None:
        super().__init__(cfg.reward, cfg.custom_reward_function)
        self._clock, self._seconds = clock, seconds

    def score(self, groups):
        self._clock.sleep(self._seconds)
        samples = [sample for group in groups for sample in group.samples]
        scored = with_outcomes(groups, [Outcome(score=float(s.index % 2)) for s in samples])
        return scored, reward_metrics(scored)


def make_cluster(workers: VirtualWorkers, cfg: RunConfig) -> Cluster:
    """Return the cluster of a trainer with engines on devices of their own."""
    placement = engines_apart(
        Layout(), 1, 1, own_nodes=1, own_devices_per_node=len(workers.engines)
    )
    group: Any = workers
    return Cluster.of(group, placement, cfg.actor.cut)
