"""Run folders to report on."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from mcore_rl.observability.report.page import write_report

NUM_STEPS = 5

CONFIG = """
trainer: {experiment_name: <gmpo>}
actor: {policy_loss: {loss_mode: geo_mean}, clip_ratio_low: 0.4}
"""


def make_records() -> list[dict[str, float]]:
    records = []
    for step in range(NUM_STEPS):
        record = {
            "step": step,
            "reward/mean": 0.1 + math.sin(step),
            "reward/zero_std_group_frac": 0.25,
            "reward/failed_frac": 0.0,
            "rollout/failed_frac": 0.5,
            "rollout/response_tokens/mean": 3.0 + step,
            "rollout/response_tokens/min": 1.0,
            "rollout/response_tokens/max": 9.0,
            "rollout/staleness/max": 1.0,
            "actor/ratio/min": 0.25,
            "actor/ratio/max": 1.0 + step,
            "actor/ratio/mean": 1.0,
            "actor/seq_ratio/min": 0.9,
            "actor/seq_ratio/max": 1.1,
            "mismatch/logprob_abs_diff/max": 3e-6 / (step + 1),
            "mismatch/logprob_abs_diff/mean": 0.0,
            "actor/grad_norm": math.nan if step == 2 else 1.0,
            "actor/pg_loss": -0.01 * step,
            "actor/entropy": 1.0,
            "perf/tokens_per_s": 1000.0,
            "perf/engines_busy_frac": 0.5 + 0.01 * step,
            "perf/trainer_busy_frac": 0.4,
            "time/step": 3.0,
            "time/rollout": 1.0,
            "time/train": 1.5,
        }
        if step % 2 == 0:
            record["eval/gsm8k/accuracy"] = step / 10
        records.append(record)
    return records


def make_sample(step: int, split: str = "train", **fields: Any) -> dict[str, Any]:
    """Return a line of `samples.jsonl` with a response of three tokens."""
    return {
        "step": step,
        "split": split,
        "uid": f"{split}.parquet:{step}",
        "index": 0,
        "prompt": f"{step}+1=",
        "response": str(step + 1),
        "ground_truth": str(step + 1),
        "finish_reason": "stop",
        "reward": 1.0,
        "reward_status": "scored",
        "answer": str(step + 1),
        "reward_parts": {"acc": 1.0},
        "versions": [[step, 0, 3]],
        "num_tokens": 3,
        "tokens": {
            "texts": [str(step + 1), " ", "<|im_end|>"],
            "rollout_logprobs": [-0.5, -0.25, -0.125],
            "logprob_diffs": None if split == "val" else [0.0, 0.01, -1.0],
            "advantages": None if split == "val" else {"values": [0.5, -0.5], "counts": [2, 1]},
        },
    } | fields


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run_dir(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    write_lines(path / "metrics.jsonl", make_records())
    old = {"uid": "t:0", "ground_truth": "4", "reward": 0.0, "finish_reason": "stop"}
    samples = [
        {"step": 3, "split": "train", "prompt": "old prompt", "response": "0", **old},
        make_sample(4),
        make_sample(4, "val", prompt="2+2=<|im_end|>", response="4 & more", tokens=None),
    ]
    write_lines(path / "samples.jsonl", samples)
    (path / "config.yaml").write_text(CONFIG)
    return path


def data_of(page: str) -> dict[str, Any]:
    """Return what a page shows, as its script reads it."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', page)
    return json.loads(text)


def reported(run_dir: Path) -> dict[str, Any]:
    """Write the report of a run and return what it shows of it."""
    (run,) = data_of(write_report(run_dir).read_text())["runs"]
    return run
