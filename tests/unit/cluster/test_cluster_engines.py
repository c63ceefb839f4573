"""Engines that are lost, slow, or have loaded something else: what the cluster does."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.group import done
from mcore_rl.cluster.placement import colocated, engines_apart
from mcore_rl.data.packing import TokenBudget
from mcore_rl.errors import (
    EngineLostError,
    HangError,
    RunError,
    WeightSyncError,
    WorkerLostError,
)
from mcore_rl.types import Layout, VersionSpan
from mcore_rl.workers.roles import EngineProcess, Rollout, WeightSource
from tests.carriers import make_result
from tests.unit.cluster.echo_workers import (
    EchoWorkers,
    alone,
    tokens,
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
