"""Operations of actor, critic and reference on sequences.

The trainer cuts sequences into micro-batches for the data-parallel ranks, sends each share to the
first of the ranks that work on it, and puts the results back in order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mcore_rl.cluster.group import Call, WorkerGroup, call, call_all, results
from mcore_rl.cluster.phases import Phase, Phases
from mcore_rl.cluster.placement import Placement
from mcore_rl.cluster.routes import Routes
from mcore_rl.data.packing import Cut, packing_metrics, plan_minibatch, plan_pass
from mcore_rl.errors import CheckpointError
from mcore_rl.metrics import Metrics, merge, of_one_update
from mcore_rl.types import (
    NUMBERS,
    MinibatchPlan,
    Numbers,
    RoutesAt,
    Share,
    TokenNumbers,
    TokenSequence,
)
from mcore_rl.workers.roles import Actor, Critic

T = TypeVar("T")

_SAVES = {Actor: Phase.SAVE, Critic: Phase.SAVE_CRITIC}


class Trainer:
    """The models that are trained.

    Args:
        workers: running workers.
        placement: where they stand.
        routes: the known routes that the workers hold.
        phases: what their devices hold.
        cut: how a minibatch of the actor is cut into micro-batches.
        critic_cut: the same for the critic; None: there is no critic.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        placement: Placement,
        routes: Routes,
        phases: Phases,
        cut: Cut,
        critic_cut: Cut | None = None,
    ) -> None:
        self._workers, self._placement, self._routes = workers, placement, routes
        self._phases = phases
        self._cut, self._critic_cut = cut, critic_cut

    def logprobs(self, *minibatches: Sequence[TokenSequence]) -> list[Numbers]:
        """Return logprobs of every trained token under the current weights, by sequence.

        Args:
            minibatches: of the updates to come. Sequences with routes are replayed on the rank that
                trains on them, so routes go to one rank; other sequences are cut as one minibatch.
        """
        sequences = list(chain.from_iterable(minibatches))
        replays = any(sequence.routed_experts is not None for sequence in sequences)
        parts = minibatches if replays else [sequences]
        self._phases.enter(Phase.LOGPROBS)
        by_rank = self._forward(Actor.logprobs, parts, self._cut, reads=("routed_experts",))
        return _by_sequence(by_rank)

    def record_logprobs(
        self, *minibatches: Sequence[TokenSequence]
    ) -> list[tuple[Numbers, RoutesAt]]:
        """Return logprobs as `logprobs` does, and where the routes are, by sequence.

        Args:
            minibatches: of the updates to come, whose ranks record what they will replay.
        """
        self._phases.enter(Phase.LOGPROBS)
        self._routes.expect()
        by_rank = self._forward(Actor.record_logprobs, minibatches, self._cut)
        logprobs = _by_sequence(numbers for numbers, _ in by_rank)
        found = {index: at for _, of_rank in by_rank for index, at in of_rank.items()}
        return [(numbers, found[index]) for index, numbers in enumerate(logprobs)]

    def ref_logprobs(self, *minibatches: Sequence[TokenSequence]) -> list[Numbers]:
        """Return logprobs of every trained token under the reference weights, by sequence."""
        sequences = list(chain.from_iterable(minibatches))
        self._phases.enter(Phase.REF_LOGPROBS)
        return _by_sequence(self._forward(Actor.ref_logprobs, [sequences], self._cut))

    def values(self, sequences: Sequence[TokenSequence]) -> list[Numbers]:
        """Return the critic's value of every trained token, by sequence."""
        assert self._critic_cut is not None, "there is no critic"
        self._phases.enter(Phase.VALUES)
        return _by_sequence(self._forward(Critic.values, [sequences], self._critic_cut))

    def layer_outputs(self, sequences: Sequence[TokenSequence]) -> list[dict[str, np.ndarray]]:
        """Return the outputs of embedding, layers and final norm for each sequence.

        Returns:
            By the name of the module in Hugging Face's model: [tokens - 1, H] float32.
        """
        self._phases.enter(Phase.LOGPROBS)
        found: list[dict[str, np.ndarray]] = [{} for _ in sequences]
        for outputs_of in self._forward(Actor.layer_outputs, [sequences], self._cut):
            for index, outputs in outputs_of.items():  # each stage has layers of its own
                found[index] |= outputs
        return found

    def begin_step(self) -> None:
        """Move the actor's learning-rate schedule to the coming step."""
        call_all(self._workers, Actor.begin_step)

    def begin_critic_step(self) -> None:
        """Move the critic's learning-rate schedule to the coming step."""
        call_all(self._workers, Critic.begin_step)

    def update(self, sequences: Sequence[TokenSequence], objective: Any) -> Metrics:
        """Do one optimizer update of the actor on a minibatch of sequences; return its metrics."""
        plan = self._plan(sequences, self._cut)
        counts = plan.denominators
        shares = _shares(sequences, plan.micro_batches)
        self._phases.enter(Phase.TRAIN)
        calls = self._calls(shares, lambda share: call(Actor.update, share, counts, objective))
        return merge([self._update(calls), packing_metrics(plan, self._cut)])

    def update_critic(self, sequences: Sequence[TokenSequence], objective: Any) -> Metrics:
        """Do one optimizer update of the critic on a minibatch of sequences; return its metrics."""
        assert self._critic_cut is not None, "there is no critic"
        plan = self._plan(sequences, self._critic_cut)
        counts = plan.denominators
        shares = _shares(sequences, plan.micro_batches)
        self._phases.enter(Phase.TRAIN_CRITIC)
        calls = self._calls(shares, lambda share: call(Critic.update, share, counts, objective))
        return self._update(calls)

    def begin_save(self, folder: str) -> None:
        """Begin to write the training state of actor and critic into folders of their names.

        Training may go on; the state at this call is written. One save at a time.

        Args:
            folder: exists, without these folders in it; every rank can reach it.
        """
        for name, role in self._roles.items():
            of_role = Path(folder) / name
            of_role.mkdir(exist_ok=True)
            self._phases.enter(_SAVES[role])
            call_all(self._workers, role.begin_save, str(of_role))

    def end_save(self, *, wait: bool) -> bool:
        """Complete the save that `begin_save` began if every rank has written its part.

        Args:
            wait: until all ranks have.

        Returns:
            Whether it is complete; if not, ask again.

        Raises:
            CheckpointError: if a rank cannot write, with that rank.
        """
        for name, role in self._roles.items():
            states = call_all(self._workers, role.save_state, wait)
            for rank, state in enumerate(states):
                if state.problem:
                    raise CheckpointError(
                        state.problem,
                        rank=rank,
                        role=f"worker, {name}.save",
                        step=self._workers.step,
                    )
            if not all(state.is_done for state in states):
                return False
        for role in self._roles.values():
            call_all(self._workers, role.finish_save)
        return True

    def load(self, folder: str) -> None:
        """Load the state that was saved into `folder`."""
        for name, role in self._roles.items():
            self._phases.enter(_SAVES[role])
            call_all(self._workers, role.load, str(Path(folder) / name))

    def export_hf(self, folder: str) -> None:
        """Write the actor's weights as a Hugging Face folder."""
        self._phases.enter(Phase.EXPORT)
        call_all(self._workers, Actor.export_hf, folder)

    @property
    def _roles(self) -> Mapping[str, type[Actor] | type[Critic]]:
        return {"actor": Actor} | ({"critic": Critic} if self._critic_cut else {})

    def _forward(
        self,
        method: Callable[[Any, Share | None], T],
        minibatches: Sequence[Sequence[TokenSequence]],
        cut: Cut,
        reads: Collection[str] = (),
    ) -> list[T]:
        """Return every rank's results of a pass that reads tokens, masks and `reads`."""
        layout = self._placement.layout
        lengths = [[len(sequence.token_ids) for sequence in part] for part in minibatches]
        planned = plan_pass(lengths, layout.dp, cut, multiple_of=layout.micro_batch_multiple)
        shares = _shares(list(chain.from_iterable(minibatches)), planned, reads)
        calls = self._calls(shares, lambda share: call(method, share))
        return list(results(self._workers.submit(calls)).values())

    def _update(self, calls: Mapping[int, Call[Metrics]]) -> Metrics:
        return of_one_update(merge(results(self._workers.submit(calls)).values()))

    def _plan(self, sequences: Sequence[TokenSequence], cut: Cut) -> MinibatchPlan:
        layout = self._placement.layout
        return plan_minibatch(sequences, layout.dp, cut, multiple_of=layout.micro_batch_multiple)

    def _calls(
        self, shares: Sequence[Share], make: Callable[[Share | None], Call[T]]
    ) -> dict[int, Call[T]]:
        """Return the call of every rank: the first rank of a share receives it, the others None.

        The routes to replay are on that rank when this returns.
        """
        self._routes.deliver(shares)
        spread = make(None)
        calls = dict.fromkeys(range(self._placement.world_size), spread)
        for ranks, share in zip(self._placement.share_ranks, shares, strict=True):
            calls[ranks[0]] = make(share)
        return calls


def _shares(
    sequences: Sequence[TokenSequence],
    micro_batches: Sequence[Sequence[Sequence[int]]],
    reads: Collection[str] = (*NUMBERS, "routed_experts"),
) -> list[Share]:
    """Return the share of every data-parallel rank, with the numbers that the pass reads."""
    return [Share.of(sequences, of_rank, reads) for of_rank in micro_batches]


def _by_sequence(by_rank: Iterable[TokenNumbers]) -> list[Numbers]:
    """Return the numbers of each sequence, from the rank that has them."""
    found = {index: numbers for of_rank in by_rank for index, numbers in of_rank.by_index()}
    return [found[index] for index in range(len(found))]
