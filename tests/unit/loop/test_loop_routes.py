"""Routes in the loop: wrong ones end the run, recorded ones reach the updates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_workers import REWARD, FakeWorkers, UnigramEngine, make_cluster, make_config, make_inputs

from mcore_rl.errors import RolloutError
from mcore_rl.loop.agreement import check_agreement
from mcore_rl.loop.collect import generate
from mcore_rl.types import Routing

ROUTING = Routing(layers=[1, 3], num_experts=4, topk=2)


def good_routes(num_inputs):
    return np.tile(np.array([[0, 3], [2, 1]], np.uint8), (num_inputs, 1, 1))


def with_one_row_changed(experts):
    def routes(num_inputs):
        changed = good_routes(num_inputs)
        changed[-1, 1] = experts
        return changed

    return routes


def engine_class(routes):
    """Return the class of an engine whose results carry `routes(number of inputs)`."""

    class Engine(UnigramEngine):
        def _draw(self, request):
            result = super()._draw(request)
            num_inputs = len(request.prompt_token_ids) + len(result.token_ids) - 1
            return replace(result, routed_experts=routes(num_inputs))

    return Engine


@pytest.fixture
def start(tmp_path):
    """Return a function: routes -> (config, inputs, cluster) of a run that replays the engine's."""

    def start_with(routes):
        file = tmp_path / "reward.py"
        file.write_text(REWARD)
        cfg = make_config("actor.router_replay.mode=R3")
        inputs = replace(make_inputs(file, cfg, total_steps=1, num_val=0), routing=ROUTING)
        cluster = make_cluster(FakeWorkers(engine=engine_class(routes)), cfg)
        cluster.engines.sync_weights(version=0)
        return cfg, inputs, cluster

    return start_with


WRONG_SHAPES = {
    "none": (lambda n: None, "returned routed experts none for"),
    "one too few": (lambda n: good_routes(n - 1), "returned routed experts uint8 of shape"),
    "one layer": (lambda n: good_routes(n)[:, :1], "layers with experts, experts per token"),
    "signed": (lambda n: good_routes(n).astype(np.int64), "returned routed experts int64 of"),
}
WRONG_EXPERTS = {
    "too high": (with_one_row_changed([1, 4]), r"the experts \[1, 4\] for token \d+ in layer 3"),
    "twice": (with_one_row_changed([2, 2]), r"not 2 different ones below 4"),
}


@pytest.mark.parametrize("case", WRONG_SHAPES | WRONG_EXPERTS)
def test_wrong_routes_end_the_run_before_the_first_step(start, case):
    routes, message = (WRONG_SHAPES | WRONG_EXPERTS)[case]
    with pytest.raises(RolloutError, match=message) as caught:
        check_agreement(*start(routes), step=0)
    assert caught.value.step == 0


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_routes_that_go_missing_end_the_run_in_any_step(start, case):
    cfg, inputs, cluster = start(WRONG_SHAPES[case][0])
    with pytest.raises(RolloutError, match=WRONG_SHAPES[case][1]):
        generate(cfg, inputs, cluster, inputs.prompts.peek(4), step=0)


def test_the_routes_of_the_engine_reach_the_samples(start):
    cfg, inputs, cluster = start(good_routes)
    check_agreement(cfg, inputs, cluster, step=0)
    for group in generate(cfg, inputs, cluster, inputs.prompts.peek(4), step=0):
        for sample in group.samples:
            expected = good_routes(len(sample.token_ids) - 1)
            assert np.array_equal(sample.to_sequence().routed_experts, expected)


def test_recorded_routes_are_those_of_the_step_in_every_update(run_loop):
    """R2: the pass for the old logprobs records, and no other pass takes its place."""
    run = run_loop("actor.router_replay.mode=R2", steps=2)
    assert run.counts["actor.record_logprobs"] == 2
    assert run.counts["actor.logprobs"] == 1  # the check before the first step
    assert len(run.updates) == 4
    for number, sequences in enumerate(run.updates):
        for sequence in sequences:
            assert sequence.routed_experts.shape == (len(sequence.token_ids) - 1, 1, 1)
            assert set(sequence.routed_experts.flat) == {number // 2}
            assert len(sequence.old_logprobs) == len(sequence.token_ids)


def test_without_replay_no_sequence_carries_routes(run_loop):
    run = run_loop(steps=1)
    assert {s.routed_experts for sequences in run.updates for s in sequences} == {None}
    assert run.counts["actor.record_logprobs"] == 0
