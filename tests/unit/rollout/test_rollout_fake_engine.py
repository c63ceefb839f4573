"""The engine without a model: the same answers to the same requests, and the rules of weights."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.rollout.base import EngineSpec, GenerationRequest, RolloutConfig, SamplingParams
from mcore_rl.rollout.hosts.in_process import InProcessEngine
from mcore_rl.types import Routing
from mcore_rl.weight_sync.base import Link
from mcore_rl.weight_sync.digest import Manifest, full_digest
from mcore_rl.weight_sync.direct import Tensors

VOCABULARY = 50


@pytest.fixture
def make_engine(tmp_path):
    """Return a function (**fields of EngineSpec) -> a fake engine that holds weights."""

    def make(version=0, **fields):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
        spec = EngineSpec(
            **{
                "model_path": str(tmp_path),
                "dtype": "float32",
                "max_model_len": 64,
                "stop_token_ids": [7],
                "config": RolloutConfig(name="fake"),
                "run_folder": str(tmp_path),
                **fields,
            }
        )
        link = Link(transport="direct", run_folder=str(tmp_path), engine=0, engine_rank=0)
        engine = InProcessEngine(spec, link)
        if version >= 0:
            engine.start_weight_update(version)
            engine.finish_weight_update(Manifest())
        return engine

    return make


def request(prompt, seed, max_tokens=8):
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, top_k=-1, max_tokens=max_tokens, seed=seed
    )
    return GenerationRequest(prompt_token_ids=prompt, sampling=sampling)


REQUESTS = [request([1, 2, i % 3], seed=i // 3) for i in range(60)]


def drawn(result):
    return result.token_ids.tolist(), result.logprobs.tolist(), result.finish_reason


def test_answers_depend_on_prompt_and_seed_alone(make_engine):
    first, second = make_engine(), make_engine()
    forward = [drawn(result) for result in first.submit([REQUESTS])[0].result()]
    assert [drawn(result) for result in second.submit([REQUESTS[::-1]])[0].result()][
        ::-1
    ] == forward
    assert [drawn(first.submit([[r]])[0].result()[0]) for r in REQUESTS] == forward
    assert len({tuple(tokens) for tokens, *_ in forward}) > 50


def test_answers_end_within_the_limit_with_a_stop_token_or_by_length(make_engine):
    results = make_engine().submit([REQUESTS])[0].result()
    assert {result.finish_reason for result in results} == {"stop", "length"}
    for result in results:
        assert 1 <= len(result.token_ids) <= 8
        if result.finish_reason == "stop":
            assert result.token_ids[-1] == 7
        else:
            assert len(result.token_ids) == 8
        assert set(result.logprobs.tolist()) == {np.float32(-math.log(VOCABULARY))}
        assert all(0 <= token < VOCABULARY for token in result.token_ids)


def test_routes_are_drawn_when_they_are_asked_for(make_engine):
    assert {result.routed_experts for result in make_engine().submit([REQUESTS])[0].result()} == {
        None
    }
    engine = make_engine(routing=Routing(layers=[1, 3, 5], num_experts=6, topk=4))
    results = engine.submit([REQUESTS])[0].result()
    for r, result in zip(REQUESTS, results, strict=True):
        num_inputs = len(r.prompt_token_ids) + len(result.token_ids) - 1
        assert result.routed_experts.shape == (num_inputs, 3, 4)
        assert all(len(set(experts)) == 4 for experts in result.routed_experts.reshape(-1, 4))
        assert result.routed_experts.max() < 6
    again = engine.submit([REQUESTS])[0].result()
    assert all(
        (a.routed_experts == b.routed_experts).all() for a, b in zip(results, again, strict=True)
    )


def test_without_stop_tokens_every_answer_ends_by_length(make_engine):
    results = make_engine(stop_token_ids=[]).submit([REQUESTS])[0].result()
    assert {result.finish_reason for result in results} == {"length"}


def test_nothing_is_generated_without_complete_weights(make_engine):
    engine = make_engine(version=-1)
    assert engine.weight_version == -1
    with pytest.raises(RolloutError, match="an engine that"):
        engine.submit([REQUESTS])[0].result()
    engine.start_weight_update(3)
    tensors, manifest = [("a", torch.zeros(2)), ("b", torch.zeros(2))], Manifest()
    manifest.add(tensors)
    engine.update_weights(Tensors(tensors))
    with pytest.raises(RolloutError, match="an engine that"):
        engine.submit([REQUESTS])[0].result()
    engine.finish_weight_update(manifest)
    assert {
        span.version for result in engine.submit([REQUESTS])[0].result() for span in result.versions
    } == {3}
    assert engine._engine.num_updated_tensors == 2
    engine.start_weight_update(4)
    assert engine.weight_version == -1
    with pytest.raises(RolloutError):
        engine.submit([REQUESTS])[0].result()


def test_an_engine_refuses_to_finish_with_other_weights_and_tells_what_it_loaded(make_engine):
    engine, tensors, manifest = make_engine(), [("a", torch.ones(2))], Manifest()
    manifest.add([*tensors, ("b", torch.ones(2))])
    engine.start_weight_update(4, with_digests=True)
    engine.update_weights(Tensors(tensors))
    with pytest.raises(WeightSyncError, match=r"weights 4 are not what was sent: b did not arrive"):
        engine.finish_weight_update(manifest)
    engine.abort_weight_update()
    assert engine.weight_version == -1
    with pytest.raises(RolloutError, match="has no complete weights"):
        engine.submit([REQUESTS])[0].result()
    assert engine.loaded_digests() == [{"a": full_digest(torch.ones(2))}]
