"""Workers that echo what they get, a cluster of them, and requests for it."""

from __future__ import annotations

from typing import Any

import numpy as np

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.group import done
from mcore_rl.cluster.placement import colocated
from mcore_rl.data.packing import TokenBudget
from mcore_rl.metrics import maximum, mean
from mcore_rl.rollout.base import (
    SamplingParams,
)
from mcore_rl.types import Layout, MicroBatch, TokenNumbers, VersionSpan
from mcore_rl.workers.roles import Actor, Rollout, SentWeights, WeightSource
from tests.carriers import make_request, make_result, make_sequence
from tests.sequences import sequences_of


class EchoWorkers:
    """A `WorkerGroup` whose results show what was asked of which rank.

    `calls` has (method, arguments by rank) of each. The last rank that works on a share reports.
    """

    def __init__(self, placement):
        self.placement = placement
        self.world_size = placement.world_size
        self.step = None
        self.calls = []
        self.given = {}
        self.save_states = []

    def submit(self, calls):
        (method,) = {call.method for call in calls.values()}
        self.calls.append((method, {rank: call.args for rank, call in calls.items()}))
        answers = {Rollout.generate: self.take, Rollout.answer: self.answer}
        answers |= {WeightSource.send_weights: self.send_weights}
        answers |= dict.fromkeys((Actor.logprobs, Actor.ref_logprobs), self.logprobs)
        answers |= {Actor.update: self.update, Actor.save_state: self.save_state}
        answer = answers.get(method, lambda rank, *args: None)
        return {rank: done(answer(rank, *call.args)) for rank, call in calls.items()}

    def share_of(self, rank):
        """Return the share that a rank reports on, as it is spread to it; None if it does not."""
        for ranks in self.placement.share_ranks:
            if rank == ranks[-1]:
                (share, *_) = self.calls[-1][1][ranks[0]]
                return share
        return None

    def take(self, rank, number, groups, keep_routes):
        assert self.placement.engines or self.placement.places[rank].engine is not None
        self.given[rank, number] = groups

    def answer(self, rank, number, group):
        return self.generate(rank, self.given[rank, number][group])

    def generate(self, rank, requests):
        return [
            make_result(
                token_ids=[rank, *request.prompt_token_ids],
                logprobs=[-1.0] * (1 + len(request.prompt_token_ids)),
                finish_reason="stop",
                versions=[VersionSpan(-1, 0, 1 + len(request.prompt_token_ids))],
            )
            for request in requests
        ]

    def send_weights(self, rank, version, engines, with_digests, with_base):
        return SentWeights({"weight_sync/bytes": maximum(100 + rank)}, {})

    def logprobs(self, rank, _):
        share = self.share_of(rank)
        whole = MicroBatch.of([]) if share is None else share.whole
        numbers = whole.token_ids.astype(np.float32)
        return TokenNumbers(indices=whole.indices, lengths=whole.lengths, numbers=numbers)

    def update(self, rank, *_):
        if (share := self.share_of(rank)) is None:
            return {}
        tokens = [s.num_trained_tokens for mb in share for s in sequences_of(mb)]
        return {"actor/entropy": mean(float(rank), sum(tokens))}

    def save_state(self, rank, wait):
        return self.save_states[rank]


def make_cluster(cut=None, engine_size=1, **layout):
    layout = Layout(**{"dp": 2, **layout})
    placement = colocated(layout, layout.world_size, engine_size)
    workers: Any = EchoWorkers(placement)
    return Cluster.of(workers, placement, cut or TokenBudget(max_tokens=64)), workers


def requests(num):
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=4, seed=0)
    return [make_request(prompt_token_ids=[100 + i], sampling=sampling) for i in range(num)]


def sequences(num):
    return [
        make_sequence(token_ids=[i] * (2 + i % 5), loss_mask=[False] + [True] * (1 + i % 5))
        for i in range(num)
    ]


def alone(num):
    """Return requests, each a group of its own."""
    return [[request] for request in requests(num)]


def tokens(results):
    return [[result.token_ids.tolist() for result in group] for group in results]
