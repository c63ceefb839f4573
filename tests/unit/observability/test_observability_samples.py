"""The sample log spreads its choice over the groups and continues after a resume."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mcore_rl.observability.samples import MAX_TOKENS, SampleLog
from mcore_rl.types import Prompt, Sample, SampleGroup, VersionSpan


def token_texts(ids):
    return [f"<{i}>" for i in ids]


def make_log(path, start_step=0, samples_per_step=2):
    return SampleLog(path, start_step, samples_per_step, token_texts)


def make_groups(num_groups, samples_per_group):
    groups = []
    for g in range(num_groups):
        prompt = Prompt(
            uid=f"t:{g}",
            token_ids=np.array([1], np.int32),
            text=f"{g}+1=",
            data_source="a",
            ground_truth=str(g + 1),
        )
        samples = [
            Sample(
                prompt=prompt,
                index=i,
                token_ids=np.array([1, 2], np.int32),
                loss_mask=np.array([False, True]),
                rollout_logprobs=np.array([0.0, -0.5], np.float32),
                finish_reason="stop",
                versions=[VersionSpan(5, 0, 1)],
                response_text=f"{g}.{i}",
                reward=float(i),
                reward_metrics={"acc": 1.0},
            )
            for i in range(samples_per_group)
        ]
        groups.append(SampleGroup(prompt=prompt, samples=samples))
    return groups


def read(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def logged(run_dir, **fields):
    """Return the line of one sample with these fields."""
    (group,) = make_groups(1, 1)
    group = replace(group, samples=[replace(group.samples[0], **fields)])
    make_log(run_dir).log(5, "train", [group])
    (record,) = read(run_dir)
    return record


def test_the_choice_is_spread_evenly_over_the_groups(tmp_path):
    make_log(tmp_path, samples_per_step=3).log(0, "train", make_groups(6, 2))
    assert [record["response"] for record in read(tmp_path)] == ["0.0", "2.0", "4.0"]


def test_a_record_holds_what_a_reader_needs(tmp_path):
    make_log(tmp_path, samples_per_step=1).log(5, "val", make_groups(1, 1))
    assert read(tmp_path) == [
        {
            "step": 5,
            "split": "val",
            "uid": "t:0",
            "index": 0,
            "prompt": "0+1=",
            "response": "0.0",
            "ground_truth": "1",
            "finish_reason": "stop",
            "reward": 0.0,
            "reward_status": "scored",
            "answer": None,
            "reward_parts": {"acc": 1.0},
            "versions": [[5, 0, 1]],
            "num_tokens": 1,
            "tokens": {
                "texts": ["<2>"],
                "rollout_logprobs": [-0.5],
                "logprob_diffs": None,
                "advantages": None,
            },
        }
    ]


def test_numbers_are_those_of_the_response_in_few_digits(tmp_path):
    tokens = logged(
        tmp_path,
        token_ids=[1, 2, 3, 4],
        loss_mask=[False, True, True, True],
        rollout_logprobs=[0.0, -1 / 3, -0.5, -0.5],
        old_logprobs=[0.0, -1 / 3, -0.5 + 1e-6, -2.0],
        advantages=[0.0, 2 / 3, 2 / 3, -1.0],
    )["tokens"]
    assert tokens["texts"] == ["<2>", "<3>", "<4>"]
    assert tokens["rollout_logprobs"] == [-0.33333, -0.5, -0.5]
    # 1e-6 near 0.5: float32 holds it to 3e-8
    assert tokens["logprob_diffs"] == [0.0, pytest.approx(1e-6, abs=3e-8), -1.5]
    assert tokens["advantages"] == {"values": [0.66667, -1.0], "counts": [2, 1]}


def test_of_a_long_response_the_first_tokens_are_written(tmp_path):
    num = MAX_TOKENS + 10
    record = logged(
        tmp_path,
        token_ids=np.arange(num + 1),
        loss_mask=np.arange(num + 1) > 0,
        rollout_logprobs=np.linspace(0, -1, num + 1),
        old_logprobs=np.zeros(num + 1),
        advantages=np.full(num + 1, 0.5),
    )
    tokens = record["tokens"]
    assert record["num_tokens"] == num
    assert tokens["texts"] == [f"<{i}>" for i in range(1, MAX_TOKENS + 1)]
    assert len(tokens["rollout_logprobs"]) == len(tokens["logprob_diffs"]) == MAX_TOKENS
    assert tokens["advantages"] == {"values": [0.5], "counts": [MAX_TOKENS]}


def test_fewer_samples_than_asked_for_are_all_written_once(tmp_path):
    make_log(tmp_path, samples_per_step=9).log(0, "train", make_groups(2, 2))
    assert [record["response"] for record in read(tmp_path)] == ["0.0", "0.1", "1.0", "1.1"]


def test_none_may_be_asked_for(tmp_path):
    make_log(tmp_path, samples_per_step=0).log(0, "train", make_groups(2, 2))
    assert read(tmp_path) == []


def test_a_resumed_run_writes_the_later_steps_again(tmp_path):
    log = make_log(tmp_path)
    for step in range(4):
        log.log(step, "train", make_groups(2, 1))
    make_log(tmp_path, start_step=2).log(2, "train", make_groups(2, 1))
    assert [record["step"] for record in read(tmp_path)] == [0, 0, 1, 1, 2, 2]
