"""From prompts to groups of samples, on the engines of a cluster."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.engines import Generation
from mcore_rl.metrics import Metric, Metrics, maximum, minimum
from mcore_rl.rollout.base import GenerationRequest, GenerationResult, SamplingParams
from mcore_rl.types import Prompt, Sample, SampleGroup


@dataclass(frozen=True, slots=True)
class Asked:
    """Samples that the engines work on."""

    prompts: Sequence[Prompt]
    generation: Generation


def ask_for_groups(
    cluster: Cluster,
    prompts: Sequence[Prompt],
    n: int,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    max_tokens: int,
    seed: str,
    keep_routes: bool = False,
) -> Asked:
    """Start the generation of `n` samples of every prompt on the engines.

    Args:
        cluster: running workers.
        prompts: what to answer.
        n: samples per prompt.
        temperature: 0.0 for greedy.
        top_p: 1.0 for all.
        top_k: -1 for all.
        max_tokens: of a response.
        seed: together with a prompt's uid and a sample's index it determines the sample, on any
            engine.
        keep_routes: whether to keep routes for a pass that replays them.
    """
    groups = [
        [
            GenerationRequest(
                prompt_token_ids=prompt.token_ids,
                sampling=SamplingParams(
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    max_tokens=max_tokens,
                    seed=_request_seed(f"{seed}:{prompt.uid}:{index}"),
                ),
            )
            for index in range(n)
        ]
        for prompt in prompts
    ]
    return Asked(prompts, cluster.engines.begin(groups, keep_routes=keep_routes))


def answered_groups(cluster: Cluster, asked: Asked, enough: int | None = None) -> list[SampleGroup]:
    """Wait for the samples and return them, group by group. Once `enough` groups have ended, the
    others are stopped, and their samples end by "abort"."""
    answered = cluster.engines.end(asked.generation, enough)
    return [
        SampleGroup(
            prompt=prompt,
            samples=[_sample(prompt, index, result) for index, result in enumerate(results)],
        )
        for prompt, results in zip(asked.prompts, answered, strict=True)
    ]


def _request_seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def _sample(prompt: Prompt, index: int, result: GenerationResult) -> Sample:
    at = result.routed_experts
    assert not isinstance(at, np.ndarray), "routes stay in the worker of their engine"
    num_prompt = len(prompt.token_ids)
    token_ids = np.concatenate([prompt.token_ids, result.token_ids])
    loss_mask = np.zeros(len(token_ids), np.bool_)
    loss_mask[num_prompt:] = True
    logprobs = np.zeros(len(token_ids), np.float32)
    logprobs[num_prompt:] = result.logprobs
    return Sample(
        prompt=prompt,
        index=index,
        token_ids=token_ids,
        loss_mask=loss_mask,
        rollout_logprobs=logprobs,
        finish_reason=result.finish_reason,
        versions=result.versions,
        routed_experts=at,
        response_text=result.text,
    )


def rollout_metrics(groups: Sequence[SampleGroup], step: int) -> Metrics:
    """Return length, truncation and staleness of the samples, under `rollout/`.

    The staleness of a sample: how many steps the oldest weights that drew one of its tokens are
    older than the weights that train on it.
    """
    samples = [sample for group in groups for sample in group.samples]
    if not samples:
        return {}
    lengths = [sample.num_response_tokens for sample in samples]
    reasons = Counter(sample.finish_reason for sample in samples)
    num_samples = len(samples)
    ages = [step - sample.weight_version for sample in samples]
    num_mixed = sum(len(sample.versions) > 1 for sample in samples)
    return {
        "rollout/response_tokens/mean": Metric(sum(lengths), "mean", num_samples),
        "rollout/response_tokens/max": maximum(max(lengths)),
        "rollout/response_tokens/min": minimum(min(lengths)),
        "rollout/truncated_frac": Metric(reasons["length"], "mean", num_samples),
        "rollout/failed_frac": Metric(reasons["abort"], "mean", num_samples),
        "rollout/staleness/max": maximum(max(ages)),
        "rollout/staleness/mean": Metric(sum(ages), "mean", num_samples),
        "rollout/several_versions_frac": Metric(num_mixed, "mean", num_samples),
    }
