"""The host of an engine, with the fake engine."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mcore_rl.cluster.placement import colocated
from mcore_rl.rollout.base import EngineSpec, GenerationRequest, RolloutConfig, SamplingParams
from mcore_rl.types import Layout
from mcore_rl.workers.rollout_worker import RolloutWorker

END, VOCABULARY = 0, 12


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

    def make(rank=0, tensor_model_parallel_size=1, **fields):
        spec = EngineSpec(
            model_path=str(tmp_path),
            dtype="float32",
            max_model_len=64,
            stop_token_ids=[END],
            config=RolloutConfig(
                name="fake", tensor_model_parallel_size=tensor_model_parallel_size
            ),
            **fields,
        )
        placement = colocated(Layout(dp=4), 4, tensor_model_parallel_size)
        worker = RolloutWorker(spec, placement.places[rank], exporter=None)
        worker.engine.finish_weight_update(0)
        return worker

    return make


def requests(num):
    return [
        GenerationRequest(
            prompt_token_ids=[3, 4],
            sampling=SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=6, seed=seed),
        )
        for seed in range(num)
    ]


def test_answers_are_decoded_where_they_are_made_without_special_tokens(make_worker):
    results = make_worker(with_text=True).generate(requests(20))
    assert any(result.token_ids[-1] == END for result in results)
    for result in results:
        words = [f"w{token}" for token in result.token_ids.tolist() if token != END]
        assert result.text.split() == words


def test_nothing_is_decoded_where_nobody_reads_it(make_worker):
    assert {result.text for result in make_worker().generate(requests(3))} == {""}


def test_the_first_rank_of_an_engine_answers_alone(make_worker):
    first, second = (make_worker(rank, tensor_model_parallel_size=2) for rank in (2, 3))
    assert len(first.generate(requests(3))) == 3
    assert second.generate(requests(3)) == []
