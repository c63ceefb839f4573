"""The controller's view of its workers: shares go out, results come back in order."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.engines import deal
from mcore_rl.cluster.group import done
from mcore_rl.cluster.placement import colocated, engines_apart
from mcore_rl.data.packing import SequenceCount, TokenBudget
from mcore_rl.errors import (
    CheckpointError,
    EngineLostError,
    HangError,
    RunError,
    WeightSyncError,
    WorkerLostError,
)
from mcore_rl.metrics import maximum, mean, to_floats
from mcore_rl.rollout.base import (
    SamplingParams,
)
from mcore_rl.types import Layout, MicroBatch, TokenNumbers, VersionSpan, WriteState
from mcore_rl.workers.roles import Actor, EngineProcess, Rollout, SentWeights, WeightSource
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


class FailingWorkers(EchoWorkers):
    """Answers the first call to generate with an error; says which ranks are started again."""

    def __init__(self, placement, error):
        super().__init__(placement)
        self.error, self.restarted = error, []

    def submit(self, calls):
        (method,) = {call.method for call in calls.values()}
        if method is Rollout.generate and self.error is not None:
            future = Future()
            future.set_exception(self.error)
            self.error = None
            self.given |= {(rank, call.args[0]): call.args[1] for rank, call in calls.items()}
            return dict.fromkeys(calls, future)
        return super().submit(calls)

    def generate(self, rank, requests):
        return [
            make_result(
                token_ids=[rank],
                logprobs=[-1.0],
                finish_reason="stop",
                versions=[VersionSpan(-1, 0, 1)],
            )
            for _ in requests
        ]

    def restart(self, rank):
        self.restarted.append(rank)
        return done(None)

    def update_address(self, rank):
        return f"address of {rank}"


def failing(error, restarts):
    placement = engines_apart(Layout(dp=2), 2, engine_size=2)
    workers: Any = FailingWorkers(placement, error)
    cluster = Cluster.of(
        workers, placement, TokenBudget(max_tokens=64), max_engine_restarts=restarts
    )
    return cluster, workers


def test_an_engine_that_is_lost_is_started_again_gets_the_weights_and_is_asked_again():
    cluster, workers = failing(EngineLostError("it was ended by SIGKILL", role="engine 0"), 1)
    assert tokens(cluster.engines.generate(alone(2))) == [[[2]], [[2]]]
    assert workers.restarted == [2]
    methods = [method for method, _ in workers.calls]
    assert methods == [
        *(Rollout.answer, Rollout.answer),  # of the call that fails
        *(EngineProcess.receive_weights, WeightSource.send_weights),
        *(Rollout.generate, Rollout.answer, Rollout.answer),
    ]
    assert workers.calls[3][1] == dict.fromkeys((0, 1), (-1, {0: "address of 2"}, False, True))


def test_weights_that_do_not_train_go_to_engines_once_and_again_to_one_that_was_lost():
    cluster, workers = failing(EngineLostError("it was ended by SIGKILL", role="engine 0"), 1)
    cluster.engines.sync_weights(-1)
    cluster.engines.sync_weights(-1)
    cluster.engines.generate(alone(2))
    sent = [args[0] for method, args in workers.calls if method is WeightSource.send_weights]
    assert [with_base for *_, with_base in sent] == [True, False, True]


def test_a_lost_engine_that_may_not_be_started_again_is_named_with_what_it_did():
    cluster, workers = failing(EngineLostError("it was ended by SIGKILL", role="engine 0"), 0)
    with pytest.raises(EngineLostError, match=r"SIGKILL, while generating \(engine 0, weights -1"):
        cluster.engines.generate(alone(2))
    assert workers.restarted == []


@pytest.mark.parametrize(
    "error",
    [
        WorkerLostError("the process was ended by SIGKILL", rank=1, role="worker, actor.update"),
        RunError("RuntimeError: in a kernel", rank=0, role="worker"),
        HangError("no progress for 20 s"),
    ],
)
def test_when_a_worker_or_the_run_has_failed_no_engine_is_started_again(error):
    cluster, workers = failing(error, 3)
    with pytest.raises(type(error)) as caught:
        cluster.engines.generate(alone(2))
    assert caught.value is error
    assert workers.restarted == []


class SlowWorkers(EchoWorkers):
    """An engine of its own process on rank 2 that answers the groups of `quick` at once, fails the
    first time it is asked for group `lost`, and the others when it is stopped."""

    quick, lost = (1, 3, 4), None

    def __init__(self, placement):
        super().__init__(placement)
        self.open = {}
        self.restarted = []

    def submit(self, calls):
        (method,) = {call.method for call in calls.values()}
        if method is Rollout.stop:
            assert {number for number, _ in self.open} == {calls[1].args[0]}
            for future in self.open.values():
                future.set_result([aborted()])
        (rank, asked), *_ = calls.items()
        if method is not Rollout.answer or asked.args[1] in self.quick:
            return super().submit(calls)
        future = Future()
        if asked.args[1] == self.lost:
            self.lost = None
            future.set_exception(EngineLostError("it was ended by SIGKILL", role="engine 0"))
        else:
            self.open[asked.args] = future
        return {rank: future}

    def restart(self, rank):
        self.open.clear()
        self.restarted.append(rank)
        return done(None)

    def update_address(self, rank):
        return f"address of {rank}"


def aborted():
    return make_result(
        token_ids=[7], logprobs=[-1.0], finish_reason="abort", versions=[VersionSpan(-1, 0, 1)]
    )


def test_once_enough_groups_have_ended_the_others_are_stopped_with_what_they_have():
    placement = engines_apart(Layout(), 1, engine_size=1)
    workers: Any = SlowWorkers(placement)
    engines = Cluster.of(workers, placement, TokenBudget(max_tokens=64)).engines
    results = engines.end(engines.begin(alone(6)), enough=3)
    assert [result.finish_reason for (result,) in results] == [
        *("abort", "stop", "abort", "stop", "stop", "abort")
    ]
    assert [method for method, _ in workers.calls].count(Rollout.stop) == 1


def test_what_ended_before_an_engine_was_lost_is_not_drawn_again():
    placement = engines_apart(Layout(), 1, engine_size=1)
    workers: Any = SlowWorkers(placement)
    workers.quick, workers.lost = (0, 1), 2
    cluster = Cluster.of(workers, placement, TokenBudget(max_tokens=64), max_engine_restarts=1)
    results = cluster.engines.generate(alone(4))
    assert [result.finish_reason for (result,) in results] == ["stop"] * 4
    given = [args[1][1] for method, args in workers.calls if method is Rollout.generate]
    assert [[len(groups) for groups in given]] == [[4, 2]]
    assert workers.restarted == [1]


def test_other_engines_draw_for_one_that_is_lost_which_joins_at_the_next_sync():
    placement = engines_apart(Layout(), 1, 1, own_nodes=1, own_devices_per_node=3)
    workers: Any = TwoStarts(placement)
    cluster = Cluster.of(workers, placement, TokenBudget(max_tokens=64), max_engine_restarts=1)
    engines = cluster.engines
    engines.sync_weights(-1)
    given = engines.begin(alone(6))
    workers.kill(2)
    by_rank = [1, 1, 3, 1, 3, 3]  # 1 and 4 were those of rank 2
    assert tokens(engines.end(given)) == [[[rank, 100 + i]] for i, rank in enumerate(by_rank)]
    assert engines.num_engines == 2
    engines.sync_weights(-1)
    assert sent(workers)[-1] == {1, 3}, "it has not started yet"
    assert engines.num_engines == 2
    workers.starting.set_result(None)
    assert tokens(engines.generate(alone(2))) == [[[1, 100]], [[3, 101]]]
    engines.sync_weights(-1)
    assert sent(workers)[-1] == {1, 2, 3}
    assert tokens(engines.generate(alone(3))) == [[[1, 100]], [[2, 101]], [[3, 102]]]


class TwoStarts(EchoWorkers):
    """Engines on ranks 1, 2 and 3, of which one is killed before it answers, and starts slowly."""

    def __init__(self, placement):
        super().__init__(placement)
        self.lost, self.starting, self.open = None, Future(), {}

    def submit(self, calls):
        futures = super().submit(calls)
        (method,) = {call.method for call in calls.values()}
        if method is Rollout.answer and 2 in calls and self.lost is None:
            futures = self.open[calls[2].args] = {2: Future()}
        return futures

    def kill(self, rank):
        self.lost = rank
        for futures in self.open.values():
            futures[rank].set_exception(EngineLostError("SIGKILL", role="engine 1"))

    def restart(self, rank):
        assert rank == self.lost
        return self.starting

    def update_address(self, rank):
        return f"address of {rank}"


def sent(workers):
    """Return to which ranks each sync sent weights."""
    return [set(args) for method, args in workers.calls if method is EngineProcess.receive_weights]


class LoadingWorkers(EchoWorkers):
    """Engines of two ranks that have loaded what `loaded` says, by rank."""

    loaded = ({"a": "float32[2]:1"}, {"a": "float32[2]:2", "b": "float32[1]:3"}) * 2

    def submit(self, calls):
        (method,) = {call.method for call in calls.values()}
        if method not in (Rollout.loaded_digests, Rollout.digests_of_model):
            return super().submit(calls)
        self.calls.append((method, {rank: call.args for rank, call in calls.items()}))
        return {rank: done([self.loaded[rank]]) for rank in calls}


def loading_cluster():
    placement = colocated(Layout(dp=4), 4, engine_size=2)
    workers: Any = LoadingWorkers(placement)
    return Cluster.of(workers, placement, TokenBudget(max_tokens=64)), workers


def test_engines_that_have_loaded_the_same_are_as_the_first_and_as_the_folder():
    cluster, workers = loading_cluster()
    of_folder = cluster.engines.digests_of_model()
    assert of_folder == list(workers.loaded[:2])
    assert cluster.engines.sync_and_compare(3) == 3
    assert cluster.engines.sync_and_compare(3, of_folder) == 3
    asked, (sent, by_rank), told = workers.calls[:3]
    assert asked == (Rollout.digests_of_model, {0: (), 1: ()})
    assert (sent, by_rank[0]) == (WeightSource.send_weights, (3, {}, True, True))
    assert told == (Rollout.loaded_digests, dict.fromkeys(range(4), ()))


@pytest.mark.parametrize(
    ("of_rank_3", "said"),
    [
        ({"a": "float32[2]:2", "b": "float32[1]:4"}, "b holds other bits"),
        ({"a": "float32[2]:9", "b": "float32[1]:4"}, "a holds other bits, and 1 more"),
        ({"a": "bfloat16[2]:2", "b": "float32[1]:3"}, r"a holds bfloat16\[2\], not float32\[2\]"),
        ({"a": "float32[2]:2"}, "b is there in one alone"),
        ({}, "a is there in one alone, and 1 more"),
    ],
)
@pytest.mark.parametrize("where", ["the first engine", "the model's folder"])
def test_an_engine_that_has_loaded_something_else_is_named_with_the_parameter(
    of_rank_3, said, where
):
    cluster, workers = loading_cluster()
    wanted = None if where == "the first engine" else workers.loaded[:2]
    workers.loaded = (*workers.loaded[:3], of_rank_3)
    message = rf"\[role engine 1\] weights 3 are not loaded as in {where}: {said}$"
    with pytest.raises(WeightSyncError, match=message):
        cluster.engines.sync_and_compare(3, wanted)
