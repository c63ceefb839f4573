"""Real vLLM behind the `RolloutEngine` protocol: seeds, stops, sampling, what it leaves alone."""

from __future__ import annotations

import collections
import math
from typing import Any

import pytest

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.base import GenerationRequest, SamplingParams
from tests.integration import vllm_cases
from tests.vllm_models import hf_logprobs

MODEL = ("qwen3_moe", "A")
STOPS = [5, 17, 23, 40, 58]


def request(prompt, seed, *, max_tokens=12, temperature=1.0, top_p=1.0, top_k=-1):
    sampling = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, seed=seed
    )
    return GenerationRequest(prompt_token_ids=prompt, sampling=sampling)


REQUESTS = [request([1 + i % 7, i % 3, 4], seed=i // 2) for i in range(40)]


@pytest.fixture(scope="module")
def before_weights(in_vllm, folders):
    """What was seen while an engine started, took weights and answered for the first time."""
    seen = {}
    in_vllm(vllm_cases.set_random_states, 7)
    expected = in_vllm(vllm_cases.random_draws), in_vllm(vllm_cases.random_draws)
    seen["expected_draws"] = expected[1]
    in_vllm(vllm_cases.set_random_states, 7)
    assert in_vllm(vllm_cases.random_draws) == expected[0]
    seen["threads_before"] = in_vllm(vllm_cases.thread_state)
    in_vllm(vllm_cases.start, folders[MODEL], stop_token_ids=STOPS)
    seen["version_at_start"] = in_vllm(vllm_cases.weight_version)
    with pytest.raises(RolloutError) as caught:
        in_vllm(vllm_cases.generate, REQUESTS)
    seen["refusal"] = caught.value
    in_vllm(vllm_cases.sync, folders[MODEL], 0)
    seen["results"] = in_vllm(vllm_cases.generate, REQUESTS)
    seen["draws"] = in_vllm(vllm_cases.random_draws)
    seen["threads"] = in_vllm(vllm_cases.thread_state)
    return seen


@pytest.fixture
def results(before_weights):
    return before_weights["results"]


def test_nothing_is_generated_before_weights_arrived(before_weights):
    assert before_weights["version_at_start"] == -1
    assert "has no complete weights" in str(before_weights["refusal"])
    assert before_weights["refusal"].role == "rollout"


def test_start_sync_and_generation_leave_the_random_states_and_threads_of_the_process(
    before_weights,
):
    """A trainer in the same process draws what it would have drawn without the engine."""
    assert before_weights["draws"] == before_weights["expected_draws"]
    assert before_weights["threads"] == before_weights["threads_before"]


def test_a_seed_draws_the_same_in_any_order_and_beside_any_neighbours(in_vllm, results):
    reversed_results = in_vllm(vllm_cases.generate, REQUESTS[::-1])[::-1]
    alone = [in_vllm(vllm_cases.generate, [r])[0] for r in REQUESTS[::8]]
    tokens = [list(r.token_ids) for r in results]
    assert [list(r.token_ids) for r in reversed_results] == tokens
    assert [list(r.token_ids) for r in alone] == tokens[::8]
    assert len({tuple(t) for t in tokens}) > 35  # other seeds and prompts draw otherwise


def test_a_response_ends_with_a_stop_token_or_at_the_limit(results):
    counts = collections.Counter(result.finish_reason for result in results)
    assert set(counts) == {"stop", "length"}
    for result in results:
        *inner, last = result.token_ids
        assert not set(inner) & set(STOPS)
        assert len(result.logprobs) == len(result.token_ids) <= 12
        if result.finish_reason == "stop":
            assert last in STOPS
        else:
            assert last not in STOPS
            assert len(result.token_ids) == 12


def test_the_logprob_of_the_stop_token_is_that_of_drawing_it(results, models):
    for r, result in zip(REQUESTS, results, strict=True):
        if result.finish_reason == "stop":
            response = result.token_ids.tolist()
            expected = hf_logprobs(models[MODEL], r.prompt_token_ids.tolist(), response, 1.0)
            # As in test_vllm_weight_sync.
            assert result.logprobs[-1] == pytest.approx(float(expected[-1, response[-1]]), abs=1e-4)


def test_no_requests_give_no_results(in_vllm, before_weights):
    assert in_vllm(vllm_cases.generate, []) == []


def test_more_prompt_tokens_than_one_forward_takes_are_answered(in_vllm, before_weights):
    """30 prompts of 150 tokens, of which no two begin alike; a forward takes 4096 tokens."""
    wanted = [request([i, *range(50), *range(50), *range(49)], seed=i) for i in range(30)]
    results = in_vllm(vllm_cases.generate, wanted)
    alone = in_vllm(vllm_cases.generate, wanted[27:28])
    assert list(results[27].token_ids) == list(alone[0].token_ids)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_tokens_are_drawn_with_the_probabilities_that_are_reported(
    in_vllm, before_weights, models, temperature
):
    """600 draws of one token: chi-square against softmax(logits / temperature) of transformers."""
    prompt = [11, 3]
    wanted = [request(prompt, seed=i, max_tokens=1, temperature=temperature) for i in range(600)]
    draws = [result.token_ids[0] for result in in_vllm(vllm_cases.generate, wanted)]
    probabilities = hf_logprobs(models[MODEL], prompt, [0], temperature)[0].exp().tolist()
    counts = collections.Counter(draws)
    # Tokens that are expected fewer than 5 times are taken together.
    cells = [(counts[t], 600 * p) for t, p in enumerate(probabilities) if 600 * p >= 5]
    rest = 600 - sum(c for c, _ in cells), 600 - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    chi_square = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    # Mean `freedom`, standard deviation sqrt(2 * freedom); seeds are fixed, 21.0 of 14 and 28.8 of
    # 30 degrees of freedom observed.
    assert freedom >= 5
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_validation_may_draw_from_the_most_likely_tokens_only(in_vllm, before_weights, models):
    prompt = [11, 3]
    order = hf_logprobs(models[MODEL], prompt, [0], 1.0)[0].sort(descending=True)
    in_nucleus = int((order.values.exp().cumsum(0) < 0.5).sum()) + 1
    cases: list[tuple[dict[str, Any], int]] = [({"top_k": 3}, 3), ({"top_p": 0.5}, in_nucleus)]
    for kwargs, allowed in cases:
        wanted = [request(prompt, seed=i, max_tokens=1, **kwargs) for i in range(100)]
        drawn = {result.token_ids[0] for result in in_vllm(vllm_cases.generate, wanted)}
        assert drawn == set(order.indices[:allowed].tolist())


# The engine is given up from here on: these come last in the file.


def test_nothing_is_generated_while_weights_are_half_there(in_vllm, before_weights, folders):
    in_vllm(vllm_cases.start_update)
    assert in_vllm(vllm_cases.weight_version) == -1
    with pytest.raises(RolloutError, match="is taking weights"):
        in_vllm(vllm_cases.generate, REQUESTS[:1])


def test_an_engine_that_puts_requests_back_for_want_of_cache_draws_the_same(in_vllm, folders):
    requests = [request([1 + i, 3, 4], seed=i, max_tokens=200) for i in range(12)]
    found = []
    for size in (32 << 20, 1 << 20):
        in_vllm(vllm_cases.start, folders[MODEL], kv_cache_memory_bytes=size, max_num_seqs=12)
        in_vllm(vllm_cases.sync, folders[MODEL], 0)
        found.append(in_vllm(vllm_cases.generate_and_watch, requests))
    (roomy, never), (tight, often) = found
    assert never["preempted"] == 0
    assert often["preempted"] > 0
    for mine, theirs in zip(tight, roomy, strict=True):
        assert list(mine.token_ids) == list(theirs.token_ids)
        # What was computed again was computed in other batches; 0.0 observed.
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_an_engine_that_sleeps_in_the_midst_of_requests_draws_the_same(in_vllm, folders):
    requests = [request([1 + i, 3, 4], seed=i, max_tokens=40) for i in range(6)]
    in_vllm(vllm_cases.start, folders[MODEL], sleep_level=1)
    in_vllm(vllm_cases.sync, folders[MODEL], 0)
    whole = in_vllm(vllm_cases.generate, requests)
    broken, num_sleeps = in_vllm(vllm_cases.generate_and_sleep, requests, 7)
    assert num_sleeps >= 5
    for mine, theirs in zip(broken, whole, strict=True):
        assert list(mine.token_ids) == list(theirs.token_ids)
        assert mine.versions == theirs.versions
        # What was computed again was computed in other batches; 0.0 observed.
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_another_engine_draws_the_same(in_vllm, results, folders):
    """A different share of the requests and other limits: what engines of several ranks do."""
    in_vllm(vllm_cases.start, folders[MODEL], stop_token_ids=STOPS, max_num_seqs=3)
    in_vllm(vllm_cases.sync, folders[MODEL], 4)
    again = in_vllm(vllm_cases.generate, REQUESTS[1::2])
    for mine, theirs in zip(again, results[1::2], strict=True):
        assert list(mine.token_ids) == list(theirs.token_ids)
        # float32 matrix products over batches of other sizes may round otherwise; 0.0 observed.
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert [span.version for span in mine.versions] == [4]
