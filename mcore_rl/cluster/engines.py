"""The fleet of rollout engines: requests go out to all of them, results come back in order, and
weights go to all of them.

An engine that is a process of its own and fails is started again where that is allowed. Meanwhile
other engines answer its requests, from the first token on and with the same seeds: with the same
weights this gives the same samples. It takes requests again from the next weight sync on. If no
other engine is left, the run waits for it (`membership.py`).
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import numpy as np

from mcore_rl.cluster.answers import check_results
from mcore_rl.cluster.busy import BusyTimes
from mcore_rl.cluster.fleet import Fleet
from mcore_rl.cluster.group import Call, WorkerGroup, call, results
from mcore_rl.cluster.membership import Membership, Start
from mcore_rl.cluster.phases import Phase, Phases
from mcore_rl.cluster.placement import Placement
from mcore_rl.cluster.routes import Routes
from mcore_rl.errors import (
    HangError,
    RolloutError,
    RunError,
    StoppedError,
    WeightSyncError,
)
from mcore_rl.metrics import Metrics, merge
from mcore_rl.rollout.base import GenerationRequest, GenerationResult, PauseMode
from mcore_rl.workers.roles import EngineProcess, Rollout, WeightSource

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Generation:
    """Groups of requests that were given to the engines."""

    groups: Sequence[Sequence[GenerationRequest]]
    keep_routes: bool
    since: int
    """Version of the weights when they were given."""
    given: dict[int, _Given] = field(default_factory=dict)
    """Which engine has each group, by group."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Given:
    """A group in the hands of an engine."""

    start: Start
    """The engine and its start."""
    call: int
    """Number of the call that gave the group."""
    begun: Sequence[Future[None]]
    """Futures of that call, by rank of the engine."""
    answer: Future[list[GenerationResult]]


class Engines(Fleet):
    """All engines of a run, real ones.

    Args:
        workers: running workers.
        placement: where they stand.
        routes: the known routes that the workers hold.
        phases: what the devices of the trainer hold.
        max_restarts: of engines that are processes of their own, in total.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        placement: Placement,
        routes: Routes,
        phases: Phases,
        max_restarts: int = 0,
    ) -> None:
        self._workers, self._routes, self._phases = workers, routes, phases
        self._ranks = placement.engine_ranks
        self._are_apart = bool(placement.engines)
        self._membership = Membership(len(self._ranks), max_restarts)
        self._restarts: dict[int, Future[None]] = {}
        """Futures of the engines that are being started again."""
        self._numbers = itertools.count()
        """Numbers for the calls."""
        self._in_flight: list[Generation] = []
        self._busy = BusyTimes(len(self._ranks))
        self._version = -1
        self._weights: Mapping[str, str] = {}
        self._have_base = False
        """Whether all engines have the frozen weights."""
        self._is_interrupted = False

    @property
    def num_engines(self) -> int:
        """See `Fleet`."""
        return len(self._membership.members)

    @property
    def weights(self) -> Mapping[str, str]:
        """See `Fleet`."""
        return self._weights

    @property
    def num_restarts(self) -> int:
        """See `Fleet`."""
        return self._membership.num_restarts

    def begin(
        self, groups: Sequence[Sequence[GenerationRequest]], *, keep_routes: bool = False
    ) -> Generation:
        """Give all engines requests to work on.

        The requests of a group go to one engine, so that a prompt is computed once; all ranks of an
        engine get the same. Kept routes stay where they were recorded. Engines that are processes
        of their own go on while the trainer works. They pause for a weight sync, and draw with the
        new weights after it.

        Raises:
            StoppedError: if they were interrupted.
        """
        if self._is_interrupted:
            raise StoppedError
        self._enter_generation()
        if keep_routes:
            self._routes.expect()
        generation = Generation(groups=groups, keep_routes=keep_routes, since=self._version)
        self._in_flight.append(generation)
        self._give(generation, range(len(groups)))
        return generation

    def end(
        self, generation: Generation, enough: int | None = None
    ) -> list[list[GenerationResult]]:
        """Wait for a generation that was begun; return one result per request, in order, by group.

        Args:
            generation: returned by `begin`.
            enough: number of finished groups after which engines that are processes of their own
                stop the other groups. Requests of these end by "abort" with the tokens drawn so
                far. None: wait for all.

        Raises:
            RolloutError: if an engine fails, or its answer is impossible.
            StoppedError: if they were interrupted; all of them have then aborted.
        """
        self._enter_generation()
        if enough is not None:
            self._stop_beyond(generation, enough)
        answers = [self._answer(generation, group) for group in range(len(generation.groups))]
        self._in_flight.remove(generation)
        if self._is_interrupted:
            raise StoppedError
        return answers

    def _enter_generation(self) -> None:
        """Wake the engines that slept."""
        if self._phases.engines_forgot:
            if self._phases.has_trained:
                message = f"weights {self._version} are wanted, which the trainer has left"
                raise RolloutError(message, role="controller")
            self.sync_weights(self._version)
        self._phases.enter(Phase.GENERATE)

    def busy_share(self) -> float:
        """Return for how much of the time since the last call engines had requests, in the mean."""
        return self._busy.share()

    def interrupt(self) -> None:
        """See `Cluster.interrupt`."""
        self._is_interrupted = True  # first: later answers are not read
        self._workers.interrupt()

    def _give(self, generation: Generation, groups: Sequence[int]) -> None:
        """Deal groups to the engines. Each engine gets its whole share in one call, so that it
        begins all groups together; a group is answered when it has ended."""
        number, members = next(self._numbers), self._membership.members
        dealt = deal([group_cost(generation.groups[group]) for group in groups], len(members))
        shares = dict(zip(members, dealt, strict=True))
        asked = {
            engine: call(
                Rollout.generate,
                number,
                [generation.groups[groups[i]] for i in share],
                generation.keep_routes,
            )
            for engine, share in shares.items()
        }
        begun = self._workers.submit(
            {rank: of_engine for engine, of_engine in asked.items() for rank in self._ranks[engine]}
        )
        for engine, share in shares.items():
            ranks = self._ranks[engine]
            for position, i in enumerate(share):
                asked_for = call(Rollout.answer, number, position)
                answer = self._workers.submit({ranks[0]: asked_for})[ranks[0]]
                self._busy.begin(engine)
                answer.add_done_callback(lambda _, engine=engine: self._busy.end(engine))
                generation.given[groups[i]] = _Given(
                    start=self._membership.start_of(engine),
                    call=number,
                    begun=[begun[rank] for rank in ranks],
                    answer=answer,
                )

    def _stop_beyond(self, generation: Generation, enough: int) -> None:
        """Wait until `enough` groups have ended; stop the others."""
        answers = {given.answer: group for group, given in generation.given.items()}
        num_ended = 0
        while answers and num_ended < enough:
            for answer in wait(answers, return_when=FIRST_COMPLETED).done:
                group = answers.pop(answer)
                self._answer(generation, group)  # if the engine failed: from another one
                num_ended += 1
        left = [generation.given[group] for group in answers.values()]
        calls = {(given.start.engine, given.call) for given in left}
        for engine, number in sorted(calls):
            first = self._ranks[engine][0]
            self._workers.submit({first: call(Rollout.stop, number)})

    def _answer(self, generation: Generation, group: int) -> list[GenerationResult]:
        """Return the results of a group, from another engine if its own fails. After an interrupt
        the results have no meaning."""
        while True:
            given = generation.given[group]
            try:
                for begun in given.begun:
                    begun.result()
                answers = given.answer.result()
                if not self._is_interrupted:
                    versions = range(generation.since, self._version + 1)
                    check_results(generation.groups[group], answers, versions)
                return answers
            except RunError as error:
                if self._is_interrupted:
                    raise
                if self._membership.is_member(given.start):
                    self._lose(given.start.engine, error, "generating")
            self._have_members(1, Phase.REVIVE)
            self._phases.enter(Phase.GENERATE)
            self._give(generation, _unanswered(generation, given, group))

    def sync_weights(self, version: int, with_digests: bool = False) -> Metrics:
        """Give every engine the actor's weights as `version`.

        Args:
            version: of the weights.
            with_digests: as in `UpdateSession.start_weight_update`.

        Raises:
            WeightSyncError: if an engine does not take them.
        """
        self._phases.enter(Phase.SYNC)
        self._version = version
        with_base = with_digests or not self._have_base or self._phases.engines_forgot
        are_drawing = bool(self._in_flight) and not self._phases.engines_sleep
        members = self._membership.members
        paused = members if are_drawing else []
        problems = self._ask(paused, call(Rollout.pause, PauseMode.KEEP))
        coming = self._started()
        targets = [*members, *coming] if self._are_apart else []
        whole = [engine for engine in targets if engine not in problems]
        metrics, not_taken = self._send(whole, with_digests, with_base or bool(coming))
        problems = {**problems, **not_taken}
        still = [engine for engine in paused if engine not in problems]
        problems |= self._ask(still, call(Rollout.resume))
        for engine in coming:
            if engine not in problems:
                self._membership.join(engine)
        for engine, problem in problems.items():
            self._lose(engine, problem, "taking weights")
        # The digests of all engines are compared.
        self._have_members(len(self._ranks) if with_digests else 1, Phase.SYNC, with_digests)
        self._have_base = True
        self._phases.synced()
        return metrics

    def _ask(self, engines: Sequence[int], asked: Call[None]) -> dict[int, RunError]:
        """Make a call to engines; return what went wrong, by engine."""
        ranks = {rank: engine for engine in engines for rank in self._ranks[engine]}
        problems: dict[int, RunError] = {}
        futures = self._workers.submit(dict.fromkeys(ranks, asked)) if ranks else {}
        for rank, future in futures.items():
            error = future.exception()
            if isinstance(error, RunError):
                problems[ranks[rank]] = error
            elif error is not None:
                raise error
        return problems

    def digests_of_model(self) -> list[dict[str, str]]:
        """Return what the parts of an engine load from the model's folder by their own reader; see
        `RolloutEngine.loaded_digests`. The first engine is then without weights."""
        self._phases.enter(Phase.SYNC)
        self._have_base = False
        return self._digests(Rollout.digests_of_model, self._membership.members[:1])[0]

    def sync_and_compare(
        self, version: int, wanted: Sequence[Mapping[str, str]] | None = None
    ) -> int:
        """Give every engine the actor's weights as `version`, and compare the parameters that all
        have loaded, bit by bit, before their libraries pack them; return how many there are.

        Args:
            version: of the weights.
            wanted: digests that each part of an engine must have; None: those of the first engine.

        Raises:
            WeightSyncError: if an engine has loaded other weights, or does not take them.
        """
        self.sync_weights(version, with_digests=True)
        found = self._digests(Rollout.loaded_digests, self._membership.members)
        where = "in the first engine" if wanted is None else "in the model's folder"
        for engine, of_engine in enumerate(found):
            for of_part, wanted_part in zip(of_engine, wanted or found[0], strict=True):
                if lines := _differences(wanted_part, of_part):
                    more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
                    message = f"weights {version} are not loaded as {where}: {lines[0]}{more}"
                    raise WeightSyncError(message, role=f"engine {engine}")
        return sum(len(of_part) for of_part in found[0])

    def _digests(
        self, method: Callable[..., list[dict[str, str]]], engines: Sequence[int]
    ) -> list[list[dict[str, str]]]:
        """Return what each part of these engines answers, by engine."""
        asked = [self._ranks[engine] for engine in engines]
        futures = self._workers.submit(
            dict.fromkeys([rank for ranks in asked for rank in ranks], call(method))
        )
        answers = results(futures)
        return [[part for rank in ranks for part in answers[rank]] for ranks in asked]

    def _send(
        self, engines: Sequence[int], with_digests: bool, with_base: bool
    ) -> tuple[Metrics, Mapping[int, RunError]]:
        """Send the weights to engines inside the workers, or to those named; return the metrics and
        what went wrong, by engine."""
        ranks = {engine: self._ranks[engine][0] for engine in engines}
        receive = call(EngineProcess.receive_weights, self._version)
        receiving = self._workers.submit(dict.fromkeys(ranks.values(), receive)) if ranks else {}
        addresses = {engine: self._workers.update_address(rank) for engine, rank in ranks.items()}
        send = call(WeightSource.send_weights, self._version, addresses, with_digests, with_base)
        sources = dict.fromkeys(range(self._workers.world_size), send)
        sent = results(self._workers.submit(sources)).values()
        problems: dict[int, RunError] = {}
        for of_rank in sent:
            problems |= of_rank.problems
        self._weights = next((x.digests for x in sent if x.digests), {})
        for engine, rank in ranks.items():  # an engine's own error comes first
            error = receiving[rank].exception()
            if isinstance(error, RunError):
                problems[engine] = error
            elif error is not None:
                raise error
        return merge(of_rank.metrics for of_rank in sent), problems

    def _lose(self, engine: int, error: RunError, doing: str) -> None:
        """Start a failed engine again; its requests go to others.

        Raises:
            RunError: if no restart is left, or not the engine but something else has failed.
        """
        if _is_of_the_run(error):
            raise error
        message = f"{error.message}, while {doing} (engine {engine}, weights {self._version})"
        failure = type(error)(message, rank=error.rank, role=error.role, step=error.step)
        failure.exit_code = error.exit_code
        if not self._are_apart or not self._membership.lose(engine):
            raise failure from error
        left = self._membership.num_restarts_left
        logger.warning("%s; it is started again, %d more times at most", failure, left)
        rank = self._ranks[engine][0]
        self._phases.leave(rank)
        self._restarts[engine] = self._workers.restart(rank)

    def _started(self, wait: bool = False) -> list[int]:
        """Return the engines that were started again and are ready, without weights.

        Args:
            wait: for those that are not ready yet.
        """
        found = []
        for engine in self._membership.starting:
            restart = self._restarts[engine]
            if not (wait or restart.done()):
                continue
            try:
                restart.result()
            except RunError as error:
                self._lose(engine, error, "starting")
                continue
            self._phases.join(self._ranks[engine][0])
            found.append(engine)
        return found

    def _have_members(self, least: int, phase: Phase, with_digests: bool = False) -> None:
        """If fewer than `least` engines are left, wait for those that start again and give them the
        weights."""
        while self._membership.starting and len(self._membership.members) < least:
            if not (coming := self._started(wait=True)):
                continue
            self._phases.enter(phase)
            _, problems = self._send(coming, with_digests, with_base=True)
            for engine in coming:
                if engine in problems:
                    self._lose(engine, problems[engine], "taking weights")
                else:
                    self._membership.join(engine)


def _unanswered(generation: Generation, failed: _Given, refused: int) -> list[int]:
    """Return, in order, the groups given to this start of an engine that have no results, and the
    group whose results are refused."""
    return sorted(
        group
        for group, given in generation.given.items()
        if given.start == failed.start and (group == refused or not _is_answered(given))
    )


def _is_answered(given: _Given) -> bool:
    futures = [*given.begun, given.answer]
    return all(future.done() and future.exception() is None for future in futures)


def _is_of_the_run(error: RunError) -> bool:
    """Return whether a worker (its error has a rank) or the whole run has failed. Then all calls
    fail, and no engine is started again."""
    return error.rank is not None or isinstance(error, HangError)


def group_cost(group: Sequence[GenerationRequest]) -> int:
    """Return the most tokens of a group: its prompt once, and the limit of each response."""
    responses = sum(request.sampling.max_tokens for request in group)
    return responses + max((len(request.prompt_token_ids) for request in group), default=0)


def deal(costs: Sequence[int], num_engines: int) -> list[list[int]]:
    """Return the groups of each engine, in order: the costliest first, each to the engine with the
    least work, the first of equals. Groups of equal cost go to the engines in turn."""
    loads = [(0, engine) for engine in range(num_engines)]
    shares: list[list[int]] = [[] for _ in range(num_engines)]
    for group in np.argsort(-np.asarray(costs, np.int64), kind="stable").tolist():
        load, engine = heapq.heappop(loads)
        shares[engine].append(group)
        heapq.heappush(loads, (load + costs[group], engine))
    return [sorted(share) for share in shares]


def _differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return which parameters of `found` differ from `wanted`, one line each; both map names to
    results of `full_digest`."""
    lines = []
    for name in sorted(wanted.keys() | found.keys()):
        want, have = wanted.get(name), found.get(name)
        if want is None or have is None:
            lines.append(f"{name} is there in one alone")
        elif want != have:
            (want, _), (have, _) = want.split(":"), have.split(":")
            kind = "other bits" if want == have else f"{have}, not {want}"
            lines.append(f"{name} holds {kind}")
    return lines
