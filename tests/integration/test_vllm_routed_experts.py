"""Real vLLM's routed experts, against the router of transformers."""

from __future__ import annotations

import pytest
import torch

from mcore_rl.rollout.base import SamplingParams
from tests.carriers import make_request
from tests.integration import vllm_cases
from tests.vllm_models import hf_router_logits

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
        make_request(
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
    """Each choice is the one that transformers makes after the same choices before it, or a tie.

    A choice between experts whose logits differ by less than the rounding is anyone's, and moves
    all that come after it.
    """
    num_others = 0
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.routed_experts.dtype == "uint8"
        found = torch.from_numpy(result.routed_experts).long().sort().values
        assert (found.diff() > 0).all()  # no expert twice
        logits = hf_router_logits(model, [*prompt, *result.token_ids], found)
        expected = logits.topk(found.shape[-1])
        lost = expected.values[..., -1] - logits.gather(-1, found).amin(-1)
        # float32 logits of some units: the two differ by about 1e-6.
        assert lost.max() < 1e-4
        num_others += int((found != expected.indices.sort().values).any(-1).sum())
    # Observed 0 of 3692: logits that spread over units are hardly ever so near. One tie comes back
    # in every prompt that has its tokens.
    assert num_others <= len(PROMPTS)


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
