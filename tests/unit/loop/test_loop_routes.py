"""Routes in the loop: those of the step reach its updates, wherever they were recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mcore_rl.loop.on_policy import train
from mcore_rl.loop.stop import Stop
from mcore_rl.types import Routing
from tests.unit.loop.fake_workers import (
    REWARD,
    FakeWorkers,
    UnigramEngine,
    fake_routes,
    make_cluster,
    make_config,
    make_inputs,
)


class RoutingEngine(UnigramEngine):
    """Its results carry routes that tell the version of the weights."""

    def _draw(self, request):
        result = super()._draw(request)
        num_inputs = len(request.prompt_token_ids) + len(result.token_ids) - 1
        routes = fake_routes(num_inputs, self.weight_version)
        return replace(result, routed_experts=routes)


@pytest.fixture
def run_r3(tmp_path):
    """Return a function (*overrides) -> workers after two steps that replay the engine's routes."""

    def run(*overrides):
        file = tmp_path / "reward.py"
        file.write_text(REWARD)
        cfg = make_config("actor.router_replay.mode=R3", *overrides)
        inputs = make_inputs(file, cfg, total_steps=2, num_val=2)
        inputs = replace(inputs, routing=Routing(layers=[0], num_experts=4, topk=1))
        workers = FakeWorkers(engine=RoutingEngine)
        (tmp_path / "run").mkdir()
        train(cfg, inputs, make_cluster(workers, cfg), tmp_path / "run", Stop())
        return workers

    return run


def check_replayed(replayed, sequences_of_updates):
    """Check that every update was given the routes of its step and of its sequences."""
    for number, (routes, sequences) in enumerate(zip(replayed, sequences_of_updates, strict=True)):
        assert len(routes) == len(sequences) > 0
        for of_sequence, sequence in zip(routes, sequences, strict=True):
            assert of_sequence.shape == (len(sequence.token_ids) - 1, 1, 1)
            assert set(of_sequence.flat) == {number // 2}


def test_the_routes_of_the_engines_reach_every_update(run_r3, run_loop):
    workers = run_r3("trainer.val_before_train=true", "trainer.test_freq=1")
    assert len(workers.replayed) == 4
    for number, routes in enumerate(workers.replayed):
        assert {value for of_sequence in routes for value in of_sequence.flat} == {number // 2}
    asked = [args[0][2] for method, args in workers.calls if method == "generate"]
    # The check before the first step, then validation and rollout of each step, and the last one.
    assert asked == [True, False, True, False, True, False]


def test_the_routes_of_earlier_steps_are_dropped(run_r3):
    workers = run_r3()
    drops = [i for i, method in enumerate(workers.methods) if method == "route_holder.drop"]
    rollouts = [
        i for i, (method, args) in enumerate(workers.calls) if method == "generate" and args[0][2]
    ]
    check, first, second = rollouts
    assert check < drops[0] < first < drops[1] < second
    assert len(drops) == 2


def test_the_pass_for_old_logprobs_replays_on_the_ranks_that_train(run_r3):
    """So a route is given to one rank."""
    workers = run_r3()

    def replayed(method, last):
        calls = [args for called, args in workers.calls if called == method][-last:]
        return [
            sorted(map(tuple, np.concatenate([share.whole.routes_at for share, *_ in of_rank])))
            for of_rank in zip(*calls, strict=True)
        ]

    of_pass, of_updates = replayed("actor.logprobs", 1), replayed("actor.update", 2)
    assert of_pass == of_updates
    assert all(len(of_rank) > 1 for of_rank in of_pass)


def test_recorded_routes_are_those_of_the_step_in_every_update(run_loop):
    """R2: the pass for the old logprobs records, and no other pass takes its place."""
    run = run_loop("actor.router_replay.mode=R2", steps=2)
    assert run.counts["actor.record_logprobs"] == 2
    assert run.counts["actor.logprobs"] == 1  # the check before the first step
    assert len(run.updates) == 4
    check_replayed(run.workers.replayed, run.updates)
    assert all(held == recorded for held, recorded, _ in run.workers.routes), "they stay there"
    for sequences in run.updates:
        for sequence in sequences:
            assert len(sequence.old_logprobs) == len(sequence.token_ids)


def test_without_replay_no_sequence_carries_routes(run_loop):
    run = run_loop(steps=1)
    shares = [share for args in run.arguments("actor.update") for share, *_ in args]
    assert len(shares) == 4
    for share in shares:
        assert share.whole.routes_at is None
        assert share.whole.routed_experts is None
    assert run.counts["actor.record_logprobs"] == 0
    assert run.counts["route_holder.drop"] == 0
    assert not np.concatenate([[0] * len(x) for x in run.workers.replayed]).size
