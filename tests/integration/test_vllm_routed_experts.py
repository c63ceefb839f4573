"""Real vLLM's routed experts, against the router of transformers."""

from __future__ import annotations

import pytest
import torch
import vllm_cases
from vllm_models import hf_routes

from mcore_rl.rollout.base import GenerationRequest, SamplingParams

LONG = [(7 * i) % 61 for i in range(200)]
# One prompt several times; two that share their first block of 128 tokens; short ones. Those of
# 120 tokens grow beyond their first block while they are answered.
PROMPTS = [
    *[LONG] * 3,
    [*LONG[:150], 3, 4],
    [5],
    [7, 8, 9],
    *([i, *LONG[1:120]] for i in range(5)),
    *[LONG] * 2,
]


def requests(seed, temperature=1.0):
    return [
        GenerationRequest(
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                temperature=temperature,
                top_p=1.0,
                top_k=-1,
                max_tokens=1 + 5 * (i % 4),
                seed=seed + i,
            ),
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def assert_routes_are_those_of_the_router(model, results):
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = hf_routes(model, [*prompt, *result.token_ids])
        assert result.routed_experts.dtype == "uint8"
        found = torch.from_numpy(result.routed_experts).long().sort().values
        assert found.shape == expected.shape
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_mixed"])
def test_routes_are_those_of_the_router_after_every_sync(in_vllm, models, folders, name):
    """All of prompt and response, no choice differs, also for prompts from the cache and for
    prompts that share blocks and are computed side by side."""
    in_vllm(vllm_cases.start, folders[name, "A"], with_routes=True)
    for version, weights in enumerate("ABA"):
        in_vllm(vllm_cases.sync, folders[name, weights], version)
        results, seen = in_vllm(vllm_cases.generate_and_watch, requests(seed=version))
        assert seen["cached"] > 0
        assert_routes_are_those_of_the_router(models[name, weights], results)


def test_routes_survive_preemption_and_prompts_computed_in_chunks(in_vllm, models, folders):
    """Greedy: vLLM on CPU cannot draw with a seed for a prompt that is computed in chunks."""
    name = "qwen3_moe_mixed"
    in_vllm(
        vllm_cases.start,
        folders[name, "A"],
        with_routes=True,
        kv_cache_memory_bytes=1 << 20,
        max_num_seqs=8,
        engine_kwargs={"max_num_batched_tokens": 96, "enable_chunked_prefill": True},
    )
    in_vllm(vllm_cases.sync, folders[name, "A"], 0)
    results, seen = in_vllm(vllm_cases.generate_and_watch, requests(seed=0, temperature=0.0))
    assert min(seen.values()) > 0, seen
    assert_routes_are_those_of_the_router(models[name, "A"], results)


def test_routes_are_returned_only_when_they_are_asked_for(in_vllm, folders):
    in_vllm(vllm_cases.start, folders["qwen3_moe", "A"])
    in_vllm(vllm_cases.sync, folders["qwen3_moe", "A"], 0)
    assert {r.routed_experts for r in in_vllm(vllm_cases.generate, requests(0))} == {None}
