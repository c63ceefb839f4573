"""The controller's plan of routes: who gives them to whom, once."""

from typing import Any

import numpy as np
import pytest

from mcore_rl.cluster.group import done
from mcore_rl.cluster.placement import colocated
from mcore_rl.cluster.routes import Routes
from mcore_rl.types import Layout, RoutesAt, Share, TokenSequence
from mcore_rl.workers.roles import RouteHolder
from tests.carriers import make_sequence


class RecordingWorkers:
    """A `WorkerGroup` that writes down what it is asked: (method, arguments by rank)."""

    step = None

    def __init__(self, world_size):
        self.world_size = world_size
        self.calls = []

    def submit(self, calls):
        (method,) = {call.method for call in calls.values()}
        self.calls.append((method, {rank: call.args for rank, call in calls.items()}))
        return {rank: done(None) for rank in calls}


@pytest.fixture
def routes_and_workers():
    """Routes over two data-parallel ranks of two workers each: shares go to ranks 0 and 2."""
    workers: Any = RecordingWorkers(4)
    return Routes(workers, colocated(Layout(tp=2, dp=2), 4, engine_size=1)), workers


def share(*where, lengths=(3, 4, 5)):
    """Return a share of sequences whose routes lie at (rank, key)."""
    sequences = [
        TokenSequence(
            token_ids=[1] * length,
            loss_mask=[True] * length,
            routed_experts=RoutesAt(rank=rank, key=key),
        )
        for (rank, key), length in zip(where, lengths, strict=False)
    ]
    return Share.of(sequences, [list(range(len(sequences)))])


def plain(args):
    return {
        rank: tuple({other: array.tolist() for other, array in side.items()} for side in of_rank)
        for rank, of_rank in args.items()
    }


def test_routes_go_from_where_they_lie_to_the_first_rank_of_their_share(routes_and_workers):
    routes, workers = routes_and_workers
    routes.deliver([share((0, 7), (1, 0), (3, 2)), share((0, 8), (2, 1), (1, 5))])
    [(method, args)] = workers.calls
    assert method == RouteHolder.exchange
    assert plain(args) == {
        0: ({2: [8]}, {1: [[0, 3]], 3: [[2, 4]]}),
        1: ({0: [0], 2: [5]}, {}),
        2: ({}, {0: [[8, 2]], 1: [[5, 4]]}),
        3: ({0: [2]}, {}),
    }


def test_what_was_given_is_not_given_again_before_it_is_dropped(routes_and_workers):
    routes, workers = routes_and_workers
    routes.expect()
    shares = [share((2, 0)), share((2, 1))]
    routes.deliver(shares)
    routes.deliver(shares)
    assert len(workers.calls) == 1
    routes.deliver([share((2, 1)), share((2, 0))])  # another pass, cut otherwise
    assert plain(workers.calls[-1][1]) == {0: ({}, {2: [[1, 2]]}), 2: ({0: [1]}, {})}
    routes.drop()
    routes.deliver(shares)
    methods = [method for method, _ in workers.calls]
    exchange, drop = RouteHolder.exchange, RouteHolder.drop
    assert methods == [exchange, exchange, drop, exchange]


def test_nobody_is_asked_where_no_routes_are_held(routes_and_workers):
    routes, workers = routes_and_workers
    sequence = make_sequence(token_ids=[1, 2], loss_mask=[False, True])
    routes.deliver([Share.of([sequence], [[0]]), Share.of([], [[]])])
    routes.drop()
    assert workers.calls == []


def test_the_controller_is_told_a_few_bytes_of_each_sequence():
    whole = share((0, 1), (2, 3), lengths=(4000, 4000)).whole
    assert whole.routed_experts is None
    second = whole.cut(1, 2).routes_at
    assert whole.routes_at is not None
    assert second is not None
    assert np.array_equal(whole.routes_at, [[0, 1], [2, 3]])
    assert np.array_equal(second, [[2, 3]])
