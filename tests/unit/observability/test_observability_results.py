"""The files and the table of a validation alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from mcore_rl.errors import RunError
from mcore_rl.observability.results import (
    Estimate,
    SourceResults,
    results_table,
    write_results,
    write_samples,
)
from mcore_rl.types import with_sample_fields
from tests.unit.observability.test_observability_samples import make_groups

RESULTS = {
    "openai/gsm8k": SourceResults(
        num_prompts=2,
        num_samples=8,
        metrics={
            "eval/openai/gsm8k/accuracy": Estimate(0.5, 0.25, 0.75),
            "eval/openai/gsm8k/pass_at_4": Estimate(1.0, 1.0, 1.0),
        },
    ),
    "a\x1b[2J": SourceResults(
        num_prompts=1, num_samples=1, metrics={"eval/a\x1b[2J/accuracy": Estimate(0.0, 0.0, 0.0)}
    ),
}


def test_the_table_shows_what_the_file_holds_and_commands_no_terminal(tmp_path):
    write_results(tmp_path, 20, "95%", RESULTS)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["data_sources"]["openai/gsm8k"] == {
        "num_prompts": 2,
        "num_samples": 8,
        "metrics": {
            "eval/openai/gsm8k/accuracy": {"value": 0.5, "low": 0.25, "high": 0.75},
            "eval/openai/gsm8k/pass_at_4": {"value": 1.0, "low": 1.0, "high": 1.0},
        },
    }
    assert results_table(tmp_path).splitlines() == [
        "step 20; in brackets: 95%",
        "openai/gsm8k  (2 prompts, 8 samples)",
        "  accuracy       0.5000  [0.2500, 0.7500]",
        "  pass_at_4      1.0000  [1.0000, 1.0000]",
        r"a\x1b[2J  (1 prompts, 1 samples)",
        "  accuracy      0.0000  [0.0000, 0.0000]",
        f"results  {tmp_path}/results.json",
    ]


def test_a_row_of_the_samples_holds_all_that_is_known_of_one(tmp_path):
    """Of two rewards with numbers of their own; a half of a pair becomes a question mark."""
    groups = with_sample_fields(
        make_groups(1, 2),
        reward_metrics=[{"acc": 1.0}, {"f1": 0.5}],
        answer=["5", None],
        response_text=["5", "\ud800"],
        reward_status=["scored", "failed"],
    )
    truth = {"target": ["a", "b"]}
    prompt = replace(groups[0].prompt, ground_truth=truth)
    samples = [groups[0].samples[0], replace(groups[0].samples[1], prompt=prompt)]
    write_samples(tmp_path, 0, [replace(groups[0], samples=samples)])
    first, second = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert first == {
        "data_source": "a",
        "uid": "t:0",
        "prompt": "0+1=",
        "response": "5",
        "ground_truth": "1",
        "answer": "5",
        "reward_status": "scored",
        "finish_reason": "stop",
        "index": 0,
        "response_tokens": 1,
        "reward": 0.0,
        "reward/acc": 1.0,
        "reward/f1": None,
    }
    assert (second["response"], second["answer"]) == ("?", None)
    assert (second["reward/acc"], second["reward/f1"]) == (None, 0.5)
    assert json.loads(second["ground_truth"]) == truth


def test_a_file_that_cannot_be_written_ends_the_run_in_one_line(tmp_path):
    with pytest.raises(RunError, match=r"cannot write .*results\.json"):
        write_results(tmp_path / "missing", 3, "95%", RESULTS)
    with pytest.raises(RunError, match=r"cannot write .*samples\.parquet"):
        write_samples(tmp_path / "missing", 3, make_groups(1, 1))
