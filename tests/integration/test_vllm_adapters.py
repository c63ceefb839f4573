"""Real vLLM with adapters that come by weight syncs, against transformers with merged weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mcore_rl.rollout.base import EngineAdapters, SamplingParams
from tests.carriers import make_request
from tests.integration import vllm_cases
from tests.vllm_models import hf_logprobs

RANK, ALPHA = 4, 12
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPTS = [[5], [7, 8, 9], [3] * 20, [(7 * i) % 61 for i in range(200)]]
NUM_TOKENS = 12


def spec(layers=ALL):
    return EngineAdapters(rank=RANK, alpha=ALPHA, layers=layers)


def halves_of(model, seed, layers=ALL):
    """Return random adapters by PEFT's names."""
    source = torch.Generator().manual_seed(seed)
    halves = {}
    for name, param in model.named_parameters():
        layer, _, own = name.rpartition(".")
        if own == "weight" and layer.rpartition(".")[2] in layers:
            rows, columns = param.shape
            a, b = (
                torch.randn(RANK, columns, generator=source),
                torch.randn(rows, RANK, generator=source),
            )
            halves[f"base_model.model.{layer}.lora_A.weight"] = 0.1 * a
            halves[f"base_model.model.{layer}.lora_B.weight"] = 0.1 * b
    return halves


def merged(model, halves):
    """Return a copy of the model with W + alpha / r B A."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            half = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{half}A.weight" in halves:
                param += ALPHA / RANK * halves[f"{half}B.weight"] @ halves[f"{half}A.weight"]
    return model


def requests():
    return [
        make_request(
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                temperature=1.0, top_p=1.0, top_k=-1, max_tokens=NUM_TOKENS, seed=number
            ),
        )
        for number, prompt in enumerate(PROMPTS)
    ]


def largest_difference(results, model):
    largest = 0.0
    for prompt, result in zip(PROMPTS, results, strict=True):
        response = result.token_ids.tolist()
        assert len(response) == NUM_TOKENS
        expected = hf_logprobs(model, prompt, response, 1.0)[range(NUM_TOKENS), response]
        largest = max(largest, float(np.abs(expected.numpy() - result.logprobs).max()))
    return largest


@pytest.mark.parametrize("transport", ["direct", "shared_memory", "disk"])
def test_adapters_alone_make_the_engine_compute_the_merged_weights(
    in_vllm, folders, models, tmp_path, transport
):
    """A, B, A, then other base weights: float32, sums in another order than that of merged weights,
    so that they agree and are not equal. The long prompt is in the cache of the sync before."""
    base, folder = models["qwen3", "A"], folders["qwen3", "A"]
    in_vllm(
        vllm_cases.start,
        folder,
        run_folder=str(tmp_path),
        weight_transport=transport,
        adapters=spec(),
    )
    a, b = halves_of(base, 1), halves_of(base, 2)
    answers = []
    for version, (halves, whole) in enumerate([(a, folder), (b, None), (a, None)]):
        assert in_vllm(vllm_cases.sync_adapters, halves, version, whole) == ""
        results = in_vllm(vllm_cases.generate, requests())
        assert largest_difference(results, merged(base, halves)) <= 1e-4
        assert largest_difference(results, base) > 0.1, "the adapters do something"
        assert {span.version for result in results for span in result.versions} == {version}
        assert in_vllm(vllm_cases.adapter_names) == [[version + 1]], "the one before is gone"
        answers.append([(list(r.token_ids), list(r.logprobs)) for r in results])
    assert answers[0] == answers[2]
    assert answers[0] != answers[1]
    other = models["qwen3", "B"]
    assert in_vllm(vllm_cases.sync_adapters, b, 3, folders["qwen3", "B"]) == ""
    results = in_vllm(vllm_cases.generate, requests())
    assert largest_difference(results, merged(other, b)) <= 1e-4


@pytest.mark.parametrize(
    ("name", "layers"), [("qwen2", ALL), ("qwen3_tied", ALL), ("qwen3", ("q_proj", "down_proj"))]
)
def test_families_and_parts_of_what_is_fused(in_vllm, folders, models, name, layers):
    """Biases, a tied output layer, and a query without key and value."""
    base = models[name, "A"]
    in_vllm(vllm_cases.start, folders[name, "A"], adapters=spec(layers))
    for version, whole in enumerate([folders[name, "A"], None]):
        halves = halves_of(base, version, layers)
        assert in_vllm(vllm_cases.sync_adapters, halves, version, whole) == ""
        results = in_vllm(vllm_cases.generate, requests())
        assert largest_difference(results, merged(base, halves)) <= 1e-4


@pytest.mark.parametrize(
    ("fault", "reason"), [("flipped", "arrived with other content"), ("lost", "did not arrive")]
)
def test_another_adapter_than_was_sent_is_refused(in_vllm, folders, models, fault, reason):
    halves, folder = halves_of(models["qwen3", "A"], 1), folders["qwen3", "A"]
    in_vllm(vllm_cases.start, folder, adapters=spec())
    assert in_vllm(vllm_cases.sync_adapters, halves, 0, folder) == ""
    refusal = in_vllm(vllm_cases.sync_adapters, halves, 1, None, fault)
    assert f"{next(iter(halves))} {reason}" in refusal
    assert in_vllm(vllm_cases.weight_version) == -1, "it does not serve the adapters before"


def test_adapters_without_weights_and_weights_without_adapters_are_refused(
    in_vllm, folders, models
):
    halves, folder = halves_of(models["qwen3", "A"], 1), folders["qwen3", "A"]
    in_vllm(vllm_cases.start, folder, adapters=spec())
    never = in_vllm(vllm_cases.sync_adapters, halves, 0)
    assert "the weights that do not train never arrived" in never
    in_vllm(vllm_cases.start, folder, adapters=spec())
    lacking = in_vllm(vllm_cases.refusal_of, vllm_cases.sync, folder, 0)
    assert "the adapters did not arrive" in lacking


def test_an_adapter_that_belongs_to_no_layer_is_refused(in_vllm, folders, models):
    """vLLM itself is content with an adapter that it applies to nothing."""
    halves, folder = halves_of(models["qwen3", "A"], 1), folders["qwen3", "A"]
    in_vllm(vllm_cases.start, folder, adapters=spec(("q_proj",)))
    assert "o_proj reached no layer" in in_vllm(vllm_cases.sync_adapters, halves, 0, folder)
