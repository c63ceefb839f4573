"""The controller's view of its workers: shares go out, results come back in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.engines import deal
from mcore_rl.cluster.placement import colocated
from mcore_rl.data.packing import SequenceCount, TokenBudget
from mcore_rl.errors import (
    CheckpointError,
)
from mcore_rl.metrics import to_floats
from mcore_rl.types import Layout, WriteState
from mcore_rl.workers.roles import Actor, Rollout, WeightSource
from tests.sequences import sequences_of
from tests.unit.cluster.echo_workers import (
    EchoWorkers,
    alone,
    make_cluster,
    requests,
    sequences,
    tokens,
)


@pytest.mark.parametrize("num", [0, 1, 2, 7])
def test_groups_of_one_cost_go_round_the_engines_and_results_come_back_in_order(num):
    cluster, workers = make_cluster(dp=3)
    results = cluster.engines.generate(alone(num))
    assert tokens(results) == [[[i % 3, 100 + i]] for i in range(num)]
    method, shares = workers.calls[0]
    assert method == Rollout.generate
    assert len(shares) == 3  # every rank is asked, if only for nothing
    assert [method for method, _ in workers.calls[1:]] == [Rollout.answer] * num


def test_a_group_stays_together():
    cluster, _ = make_cluster(dp=2)
    groups = [requests(3), requests(1), requests(2)]
    results = cluster.engines.generate(groups)
    assert tokens(results) == [
        [[0, 100], [0, 101], [0, 102]],
        [[1, 100]],
        [[1, 100], [1, 101]],
    ]


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 5))
def test_groups_are_dealt_so_that_no_engine_has_a_group_more_than_another(costs, num_engines):
    shares = deal(costs, num_engines)
    assert sorted(group for share in shares for group in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[group] for group in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert deal(costs, num_engines) == shares


@given(st.lists(st.integers(1, 5), max_size=9), st.integers(1, 4))
def test_groups_that_are_repeated_for_each_engine_reach_each_of_them(costs, num_engines):
    """As the check of agreement asks every engine every prompt."""
    shares = deal([cost for cost in costs for _ in range(num_engines)], num_engines)
    asked = [[group // num_engines for group in share] for share in shares]
    assert asked == [list(range(len(costs)))] * num_engines


def test_only_ranks_with_an_engine_get_requests():
    placement = colocated(Layout(dp=4), 4, engine_size=1)
    engines = zip(placement.places, (None, 0, None, 1), strict=True)
    placement = replace(placement, places=[replace(place, engine=e) for place, e in engines])
    workers: Any = EchoWorkers(placement)
    cluster = Cluster.of(workers, placement, TokenBudget(max_tokens=64))
    assert cluster.engines.num_engines == 2
    results = cluster.engines.generate(alone(5))
    assert tokens(results) == [[[1, 100]], [[3, 101]], [[1, 102]], [[3, 103]], [[1, 104]]]


def test_all_ranks_of_an_engine_get_its_requests_and_the_first_one_answers():
    cluster, workers = make_cluster(dp=4, engine_size=2)
    assert cluster.engines.num_engines == 2
    results = cluster.engines.generate(alone(3))
    assert tokens(results) == [[[0, 100]], [[2, 101]], [[0, 102]]]
    (_, given), *answers = workers.calls
    [(_, first, _), (_, same, _), (_, second, _), (_, also, _)] = given.values()
    assert [request.prompt_token_ids.tolist() for (request,) in first] == [[100], [102]]
    assert first == same
    assert [request.prompt_token_ids.tolist() for (request,) in second] == [[101]]
    assert second == also
    assert [list(asked) for _, asked in answers] == [[0], [0], [2]]


@pytest.mark.parametrize("method", ["logprobs", "ref_logprobs"])
@pytest.mark.parametrize("model_ranks", [1, 2])
@pytest.mark.parametrize("num", [1, 2, 11])
def test_logprobs_come_back_by_sequence_whoever_computed_them(method, model_ranks, num):
    """Sequences are packed and sorted on the way; the values say which sequence they are of."""
    cluster, workers = make_cluster(TokenBudget(max_tokens=12), tp=model_ranks)
    wanted = sequences(num)
    found = getattr(cluster.trainer, method)(wanted)
    assert {logprobs.dtype for logprobs in found} == {np.dtype(np.float32)}
    assert [logprobs.tolist() for logprobs in found] == [s.token_ids.tolist() for s in wanted]
    assert workers.calls[-1][0] == getattr(Actor, method)


def test_the_first_rank_of_a_share_is_given_it_once_and_the_others_nothing():
    cluster, workers = make_cluster(TokenBudget(max_tokens=12), tp=2)
    cluster.trainer.update(sequences(11), "objective")
    _, arguments = workers.calls[-1]
    assert workers.placement.share_ranks == [[0, 1], [2, 3]]
    assert arguments[1][0] is arguments[3][0] is None
    shares = arguments[0][0], arguments[2][0]
    assert shares[0] != shares[1]
    indices = [index for share in shares for mb in share for index in mb.indices]
    assert sorted(indices) == list(range(11))


def test_an_update_carries_the_counts_of_the_whole_minibatch_to_every_rank():
    cluster, workers = make_cluster()
    batch = sequences(7)
    metrics = to_floats(cluster.trainer.update(batch, "objective"))
    num_tokens = sum(s.num_trained_tokens for s in batch)
    arguments = workers.calls[-1][1].values()
    for _, denominators, objective in arguments:
        assert (denominators.num_tokens, denominators.num_sequences) == (num_tokens, 7)
        assert objective == "objective"
    assert metrics["batch/tokens"] == sum(len(s.token_ids) for s in batch)
    by_rank = [
        sum(s.num_trained_tokens for mb in share for s in sequences_of(mb))
        for share, *_ in arguments
    ]
    # One rounding of a division.
    assert metrics["actor/entropy"] == pytest.approx(by_rank[1] / num_tokens, rel=1e-12)


def test_the_cut_that_was_given_is_kept():
    cluster, workers = make_cluster(SequenceCount(num_sequences=2))
    cluster.trainer.update(sequences(7), None)
    micro_batches = [mb for share, *_ in workers.calls[-1][1].values() for mb in share]
    assert max(len(mb.lengths) for mb in micro_batches) == 2
    assert len(micro_batches) == 4


def test_an_interleaved_pipeline_gets_a_multiple_of_its_stages():
    for vpp, expected in ((1, 3), (2, 4)):
        cluster, workers = make_cluster(SequenceCount(num_sequences=1), dp=1, pp=2, vpp=vpp)
        cluster.trainer.update(sequences(3), None)
        assert len(workers.calls[-1][1][0][0]) == expected


def test_syncs_and_folders_reach_every_rank(tmp_path):
    cluster, workers = make_cluster()
    assert to_floats(cluster.engines.sync_weights(4)) == {"weight_sync/bytes": 101.0}
    cluster.trainer.begin_step()
    cluster.trainer.begin_save(str(tmp_path))
    cluster.trainer.load("b")
    cluster.trainer.export_hf("c")
    assert workers.calls == [
        (WeightSource.send_weights, {0: (4, {}, False, True), 1: (4, {}, False, True)}),
        (Actor.begin_step, {0: (), 1: ()}),
        (Actor.begin_save, dict.fromkeys((0, 1), (f"{tmp_path}/actor",))),
        (Actor.load, dict.fromkeys((0, 1), ("b/actor",))),
        (Actor.export_hf, {0: ("c",), 1: ("c",)}),
    ]


@pytest.mark.parametrize("wait", [False, True])
def test_a_checkpoint_is_completed_when_every_rank_has_written(wait):
    cluster, workers = make_cluster()
    workers.save_states = [WriteState(is_done=True), WriteState(is_done=False)]
    assert not cluster.trainer.end_save(wait=wait)
    assert workers.calls == [(Actor.save_state, {0: (wait,), 1: (wait,)})]
    workers.save_states = [WriteState(is_done=True)] * 2
    assert cluster.trainer.end_save(wait=wait)
    assert workers.calls[-1] == (Actor.finish_save, {0: (), 1: ()})


def test_the_first_rank_that_cannot_write_is_named():
    cluster, workers = make_cluster()
    workers.save_states = [
        WriteState(is_done=False),
        WriteState(is_done=True, problem="a cannot be written: disk full"),
    ]
    cluster.enter_step(7)
    with pytest.raises(CheckpointError) as caught:
        cluster.trainer.end_save(wait=False)
    assert str(caught.value) == (
        "[role worker, actor.save, rank 1, step 7] a cannot be written: disk full"
    )
