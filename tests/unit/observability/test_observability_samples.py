"""The sample log spreads its choice over the groups and continues after a resume."""

from __future__ import annotations

import json

from mcore_rl.observability.samples import SampleLog
from mcore_rl.types import Prompt, Sample, SampleGroup


def make_groups(num_groups, samples_per_group):
    groups = []
    for g in range(num_groups):
        prompt = Prompt(
            uid=f"t:{g}", token_ids=[1], text=f"{g}+1=", data_source="a", ground_truth=str(g + 1)
        )
        samples = [
            Sample(
                prompt=prompt,
                index=i,
                token_ids=[1, 2],
                loss_mask=[False, True],
                rollout_logprobs=[0.0, -0.5],
                finish_reason="stop",
                response_text=f"{g}.{i}",
                reward=float(i),
            )
            for i in range(samples_per_group)
        ]
        groups.append(SampleGroup(prompt=prompt, samples=samples))
    return groups


def read(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def test_the_choice_is_spread_evenly_over_the_groups(tmp_path):
    SampleLog(tmp_path, start_step=0, samples_per_step=3).log(0, "train", make_groups(6, 2))
    assert [record["response"] for record in read(tmp_path)] == ["0.0", "2.0", "4.0"]


def test_a_record_holds_what_a_reader_needs(tmp_path):
    SampleLog(tmp_path, start_step=0, samples_per_step=1).log(5, "val", make_groups(1, 1))
    assert read(tmp_path) == [
        {
            "step": 5,
            "split": "val",
            "uid": "t:0",
            "prompt": "0+1=",
            "response": "0.0",
            "reward": 0.0,
            "ground_truth": "1",
            "finish_reason": "stop",
        }
    ]


def test_fewer_samples_than_asked_for_are_all_written_once(tmp_path):
    SampleLog(tmp_path, start_step=0, samples_per_step=9).log(0, "train", make_groups(2, 2))
    assert [record["response"] for record in read(tmp_path)] == ["0.0", "0.1", "1.0", "1.1"]


def test_none_may_be_asked_for(tmp_path):
    SampleLog(tmp_path, start_step=0, samples_per_step=0).log(0, "train", make_groups(2, 2))
    assert read(tmp_path) == []


def test_a_resumed_run_writes_the_later_steps_again(tmp_path):
    log = SampleLog(tmp_path, start_step=0, samples_per_step=2)
    for step in range(4):
        log.log(step, "train", make_groups(2, 1))
    SampleLog(tmp_path, start_step=2, samples_per_step=2).log(2, "train", make_groups(2, 1))
    assert [record["step"] for record in read(tmp_path)] == [0, 0, 1, 1, 2, 2]
