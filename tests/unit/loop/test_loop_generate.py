"""Requests of a step: their seeds, and the samples that become of the results."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mcore_rl.loop.generate import answered_groups, ask_for_groups, rollout_metrics
from mcore_rl.metrics import to_floats
from mcore_rl.types import SampleGroup, VersionSpan
from tests.carriers import make_sample
from tests.unit.loop.fake_workers import FakeWorkers, make_cluster, make_config, make_prompts
from tests.unit.loop.loop_runs import requests_of


@pytest.fixture
def setting():
    """A cluster whose engines hold weights, and a function (seed, prompts, n) -> groups."""
    workers = FakeWorkers()
    cluster = make_cluster(workers, make_config())
    cluster.engines.sync_weights(7)

    def answer(seed, prompts, n=3):
        asked = ask_for_groups(
            cluster,
            prompts,
            n,
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
            max_tokens=6,
            seed=seed,
        )
        return answered_groups(cluster, asked)

    return SimpleNamespace(answer=answer, workers=workers)


def test_a_sample_holds_prompt_and_response_in_arrays_of_one_length(setting):
    prompts = make_prompts(4, 0, "s")
    groups = setting.answer("0:0", prompts)
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        assert [sample.index for sample in group.samples] == [0, 1, 2]
        for sample in group.samples:
            num_prompt = len(group.prompt.token_ids)
            response = sample.token_ids[num_prompt:].tolist()
            assert sample.prompt is group.prompt
            assert sample.token_ids.dtype == np.int32
            assert sample.token_ids[:num_prompt].tolist() == group.prompt.token_ids.tolist()
            assert sample.loss_mask.tolist() == [False] * num_prompt + [True] * len(response)
            assert sample.rollout_logprobs.dtype == np.float32
            assert len(sample.rollout_logprobs) == len(sample.token_ids)
            assert sample.rollout_logprobs[:num_prompt].tolist() == [0.0] * num_prompt
            assert all(logprob < 0 for logprob in sample.rollout_logprobs[num_prompt:])
            assert sample.weight_version == 7
            # The end token is special: it is trained on and not judged.
            words = [f"w{token}" for token in response if token != 0]
            assert sample.response_text.split() == words
            assert sample.finish_reason == ("stop" if response[-1] == 0 else "length")
            assert 1 <= len(response) <= 6


def test_what_is_drawn_depends_on_seed_prompt_and_index_and_not_on_its_neighbours(setting):
    prompts = make_prompts(4, 0, "s")
    tokens = {
        (g.prompt.uid, s.index): s.token_ids.tolist()
        for g in setting.answer("0:0", prompts)
        for s in g.samples
    }
    reordered = setting.answer("0:0", [prompts[2], prompts[0]], n=2)
    for group in reordered:
        for sample in group.samples:
            assert sample.token_ids.tolist() == tokens[group.prompt.uid, sample.index]


def test_seeds_differ_between_steps_prompts_and_samples(setting):
    prompts = make_prompts(3, 0, "s")
    same_tokens = [prompts[0], *make_prompts(1, 30, "s")]
    for seed in ("0:0", "0:1", "1:0"):
        setting.answer(seed, [*prompts, *same_tokens[1:]], n=4)
    seeds = [
        request.sampling.seed
        for of_call in requests_of(setting.workers)
        for of_rank in of_call
        for request in of_rank
    ]
    assert len(set(seeds)) == len(seeds) == 3 * 4 * 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_rollout_metrics_describe_lengths_ends_and_staleness():
    prompt = make_prompts(1, 0, "s")[0]

    def sample(length, finish_reason, *versions):
        spans = [VersionSpan(version, i, i + 1) for i, version in enumerate(versions)]
        return make_sample(
            prompt=prompt,
            index=0,
            token_ids=[*prompt.token_ids, *range(length)],
            loss_mask=[False] * (len(prompt.token_ids) + length),
            rollout_logprobs=[0.0] * (len(prompt.token_ids) + length),
            finish_reason=finish_reason,
            versions=[*spans[:-1], replace(spans[-1], end=length)],
        )

    samples = [
        sample(1, "stop", 5),
        sample(6, "length", 4, 5),
        sample(6, "length", 5),
        sample(3, "abort", 5),
    ]
    groups = [
        SampleGroup(prompt=prompt, samples=samples[:1]),
        SampleGroup(prompt=prompt, samples=samples[1:]),
    ]
    assert to_floats(rollout_metrics(groups, step=5)) == {
        "rollout/response_tokens/mean": 4.0,
        "rollout/response_tokens/max": 6.0,
        "rollout/response_tokens/min": 1.0,
        "rollout/truncated_frac": 0.5,
        "rollout/failed_frac": 0.25,
        "rollout/staleness/max": 1.0,
        "rollout/staleness/mean": 0.25,
        "rollout/several_versions_frac": 0.25,
    }
