"""Which rank works on which sequence, in the passes and in the updates that follow them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.cluster.group import done
from mcore_rl.cluster.phases import Phases
from mcore_rl.cluster.placement import colocated
from mcore_rl.cluster.routes import Routes
from mcore_rl.cluster.trainer import Trainer
from mcore_rl.data.packing import SequenceCount, TokenBudget
from mcore_rl.types import Layout, MicroBatch, Offloads, RoutesAt, TokenNumbers, TokenSequence
from mcore_rl.workers.roles import Actor, RouteHolder
from tests.carriers import make_sequence

BUDGET = 24


class CountingWorkers:
    """A `WorkerGroup` without a model that knows which rank was sent which sequence, and where the
    routes lie. A sequence is told by its first token."""

    step = None

    def __init__(self, world_size):
        self.world_size = world_size
        self.sent = {Actor.logprobs: {}, Actor.record_logprobs: {}, Actor.update: {}}
        """By method and sequence: (rank, tokens of its micro-batch)."""
        self.num_kept = 0
        self.given = []
        """(rank that was given routes, rank that recorded them, their key)."""

    def submit(self, calls):
        return {rank: done(self.answer(rank, call)) for rank, call in calls.items()}

    def answer(self, rank, call):
        if call.method == RouteHolder.exchange:
            for other, taken in call.args[1].items():
                self.given += [(rank, other, key) for key, _ in taken.tolist()]
            return None
        share = call.args[0]
        whole = MicroBatch.of([]) if share is None else share.whole
        for micro_batch in share or []:
            starts = np.cumsum(micro_batch.lengths) - micro_batch.lengths
            together = tuple(micro_batch.token_ids.tolist())
            for sequence in micro_batch.token_ids[starts].tolist():
                self.sent[call.method][sequence] = rank, together
        if call.method == Actor.update:
            return {}
        numbers = TokenNumbers(
            indices=whole.indices,
            lengths=whole.lengths,
            numbers=np.zeros(len(whole.token_ids), np.float32),
        )
        if call.method == Actor.logprobs:
            return numbers
        return numbers, {index: self.keep(rank) for index in whole.indices.tolist()}

    def keep(self, rank):
        self.num_kept += 1
        return RoutesAt(rank=rank, key=self.num_kept)


@st.composite
def steps(draw):
    """Return (layout, cut, minibatches of sequences that carry no routes)."""
    layout = Layout(
        tp=draw(st.integers(1, 2)),
        pp=draw(st.integers(1, 2)),
        vpp=draw(st.integers(1, 2)),
        dp=draw(st.integers(1, 4)),
    )
    cuts = [TokenBudget(max_tokens=BUDGET), SequenceCount(num_sequences=draw(st.integers(1, 4)))]
    lengths = draw(
        st.lists(st.lists(st.integers(1, BUDGET), min_size=1, max_size=12), min_size=1, max_size=4)
    )
    numbers = iter(range(sum(map(len, lengths))))
    minibatches = [
        [
            TokenSequence(token_ids=[next(numbers)] + [0] * (length - 1), loss_mask=[True] * length)
            for length in of_minibatch
        ]
        for of_minibatch in lengths
    ]
    return layout, draw(st.sampled_from(cuts)), minibatches


def trainer_of(layout, cut):
    placement = colocated(layout, layout.world_size, engine_size=1)
    workers: Any = CountingWorkers(layout.world_size)
    phases = Phases(workers, Offloads())
    return Trainer(workers, placement, Routes(workers, placement), phases, cut), workers


@given(steps(), st.randoms())
def test_routes_of_engines_are_given_once_to_the_rank_that_replays_and_trains(step, source):
    layout, cut, bare = step
    trainer, workers = trainer_of(layout, cut)
    minibatches = [
        [
            replace(
                sequence,
                routed_experts=RoutesAt(
                    rank=source.randrange(layout.world_size), key=int(sequence.token_ids[0])
                ),
            )
            for sequence in minibatch
        ]
        for minibatch in bare
    ]
    trainer.logprobs(*minibatches)
    for minibatch in minibatches * 2:
        trainer.update(minibatch, None)
    assert workers.sent[Actor.logprobs] == workers.sent[Actor.update]
    ats = [s.routed_experts for minibatch in minibatches for s in minibatch]
    readers = [(workers.sent[Actor.update][at.key][0], at.rank, at.key) for at in ats]
    assert sorted(workers.given) == sorted(at for at in readers if at[0] != at[1])


@given(steps())
def test_routes_that_a_pass_records_lie_where_they_are_replayed_and_never_move(step):
    layout, cut, minibatches = step
    trainer, workers = trainer_of(layout, cut)
    recorded = iter(trainer.record_logprobs(*minibatches))
    for minibatch in minibatches:
        trainer.update([replace(s, routed_experts=next(recorded)[1]) for s in minibatch], None)
    assert workers.sent[Actor.record_logprobs] == workers.sent[Actor.update]
    assert workers.given == []


@pytest.mark.parametrize("cut", [TokenBudget(max_tokens=12), SequenceCount(num_sequences=2)])
def test_without_routes_minibatches_are_cut_as_one(cut):
    """Fewer micro-batches, since none is left half empty at the end of each minibatch."""
    layout = Layout(dp=2)
    sequences = [make_sequence(token_ids=[i, 0, 0], loss_mask=[True] * 3) for i in range(6)]
    together, workers = trainer_of(layout, cut)
    numbers = together.logprobs(sequences[:3], sequences[3:])
    assert [len(of_sequence) for of_sequence in numbers] == [3] * 6
    apart, others = trainer_of(layout, cut)
    apart.logprobs(sequences)
    assert workers.sent == others.sent
