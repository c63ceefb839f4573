"""The host of an engine, with the fake engine."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mcore_rl.cluster.group import done
from mcore_rl.cluster.placement import colocated
from mcore_rl.errors import RolloutError
from mcore_rl.rollout.base import EngineSpec, RolloutConfig, SamplingParams
from mcore_rl.rollout.hosts.in_process import InProcessEngine
from mcore_rl.types import Layout, RoutesAt, Routing
from mcore_rl.weight_sync.base import TRANSPORTS, Distance, Link, Transport
from mcore_rl.weight_sync.direct import DirectReceiver, DirectSender
from mcore_rl.workers.rollout_worker import RolloutWorker
from mcore_rl.workers.routes import RouteStore
from mcore_rl.workers.weight_source import WeightSourceWorker
from tests.carriers import make_request

END, VOCABULARY = 0, 12
NUMBERS = itertools.count()


@pytest.fixture
def make_worker(tmp_path):
    """Return a function (rank, **fields of the spec) -> host of a fake engine whose token i is the
    word w<i> and whose token 0 ends a response."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="w0").save_pretrained(tmp_path)
    config = {"vocab_size": VOCABULARY, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def make(rank=0, tensor_model_parallel_size=1, weight_transport="direct", **fields):
        spec = EngineSpec(
            model_path=str(tmp_path),
            dtype="float32",
            max_model_len=64,
            stop_token_ids=[END],
            config=RolloutConfig(
                name="fake",
                tensor_model_parallel_size=tensor_model_parallel_size,
                weight_transport=weight_transport,
            ),
            run_folder=str(tmp_path),
            **fields,
        )
        placement = colocated(Layout(dp=4), 4, tensor_model_parallel_size)
        parallel: Any = SimpleNamespace(rank=rank, host=None)
        routes = RouteStore(fields.get("routing"), parallel)
        place = placement.places[rank]
        assert place.engine is not None
        link = Link(
            transport=weight_transport,
            run_folder=str(tmp_path),
            engine=place.engine,
            engine_rank=place.engine_rank,
        )
        engine = InProcessEngine(spec, link)
        worker: Any = RolloutWorker(spec, engine, place.engine_rank == 0, routes)
        exporter: Any = SimpleNamespace(buckets=lambda max_bytes, ranks: [])
        worker.source = WeightSourceWorker(exporter, {place.engine: link}, engine, 1 << 20, None)
        worker.source.send_weights(0, {}, False, True)
        return worker

    return make


def requests(num):
    return [
        make_request(
            prompt_token_ids=[3, 4],
            sampling=SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=6, seed=seed),
        )
        for seed in range(num)
    ]


def drawn_by(worker, num, keep_routes=False):
    """Return what a worker answers to so many requests, a group."""
    number = next(NUMBERS)
    worker.generate(number, [requests(num)], keep_routes)
    return worker.answer(number, 0).result()


def test_answers_are_decoded_where_they_are_made_without_special_tokens(make_worker):
    results = drawn_by(make_worker(with_text=True), 20)
    assert any(result.token_ids[-1] == END for result in results)
    for result in results:
        words = [f"w{token}" for token in result.token_ids.tolist() if token != END]
        assert result.text.split() == words


def test_nothing_is_decoded_where_nobody_reads_it(make_worker):
    assert {result.text for result in drawn_by(make_worker(), 3)} == {""}


def test_the_first_rank_of_an_engine_answers_alone(make_worker):
    first, second = (make_worker(rank, tensor_model_parallel_size=2) for rank in (2, 3))
    assert len(drawn_by(first, 3)) == 3
    second.generate(0, [requests(3)], False)
    with pytest.raises(KeyError):
        second.answer(0, 0)


ROUTING = Routing(layers=[1, 3], num_experts=4, topk=2)


def good_routes(num_inputs):
    return np.tile(np.array([[0, 3], [2, 1]], np.uint16), (num_inputs, 1, 1))


def with_one_row_changed(experts):
    def routes(num_inputs):
        changed = good_routes(num_inputs)
        changed[-1, 1] = experts
        return changed

    return routes


@pytest.fixture
def answering(make_worker, monkeypatch):
    """Return a function: routes -> host of an engine whose results carry `routes(inputs)`."""

    def make(routes):
        worker = make_worker(routing=ROUTING)
        submit = worker.engine.submit

        def with_routes(groups):
            return [
                done([replace(r, routed_experts=routes(1 + len(r.token_ids))) for r in of_group])
                for of_group in (future.result() for future in submit(groups))
            ]

        monkeypatch.setattr(worker.engine, "submit", with_routes)
        return worker

    return make


def test_routes_stay_in_the_worker_and_results_say_where(make_worker):
    worker = make_worker(rank=2, routing=ROUTING)
    drawn = worker.engine.submit([requests(3)])[0].result()
    results = drawn_by(worker, 3, True)
    assert [r.routed_experts for r in results] == [RoutesAt(rank=2, key=key) for key in range(3)]
    for key, result in enumerate(drawn):
        held = worker._routes.get(2, key)
        assert held.dtype == np.uint8
        assert np.array_equal(held, result.routed_experts)
    assert {r.routed_experts for r in drawn_by(worker, 3, False)} == {None}


WRONG_SHAPES = {
    "none": (lambda n: None, "returned routed experts none for"),
    "one too few": (lambda n: good_routes(n - 1), "returned routed experts uint16 of shape"),
    "one layer": (lambda n: good_routes(n)[:, :1], "layers with experts, experts per token"),
    "signed": (lambda n: good_routes(n).astype(np.int64), "returned routed experts int64 of"),
    "too high": (
        with_one_row_changed([1, 260]),
        r"experts \[1, 260\] for token \d+ in layer 3",
    ),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_routes_that_are_missing_or_of_no_expert_are_refused_in_any_step(answering, case):
    routes, message = WRONG_SHAPES[case]
    found = [good_routes, routes]
    worker = answering(lambda num_inputs: found[0](num_inputs))
    drawn_by(worker, 2, True)
    found.pop(0)
    with pytest.raises(RolloutError, match=message):
        drawn_by(worker, 2, True)


def test_routes_that_name_an_expert_twice_are_refused_at_the_start(answering):
    worker = answering(with_one_row_changed([2, 2]))
    with pytest.raises(RolloutError, match=r"the experts \[2, 2\] .* not 2 different ones below 4"):
        drawn_by(worker, 2, True)


def test_both_ends_are_those_of_the_chosen_transport_by_one_link_and_close_with_the_worker(
    make_worker, monkeypatch, tmp_path
):
    closed = []

    class OwnSender(DirectSender):
        def close(self):
            closed.append(("sender", self.link))

    class OwnReceiver(DirectReceiver):
        def close(self):
            closed.append(("receiver", self.link))

    own = Transport(sender=OwnSender, receiver=OwnReceiver, reaches=frozenset(Distance))
    monkeypatch.setattr(TRANSPORTS, "_entries", TRANSPORTS._entries | {"own": own})
    worker = make_worker(rank=3, tensor_model_parallel_size=2, weight_transport="own")
    assert worker.engine.weight_version == 0
    worker.close()
    worker.source.close()
    link = Link(transport="own", run_folder=str(tmp_path), engine=1, engine_rank=1)
    assert closed == [("receiver", link), ("sender", link)]
