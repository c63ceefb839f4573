"""Runs of `mcore_rl.train`, as a user starts them: a small mixture of experts on additions, whose
reward is the share of digits in a response, so that a random model learns within twenty steps."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpu_checks.outcome import Bound, Outcome, SkippedError, Values, bounded
from gpu_checks.sizes import Sizes
from mcore_rl.tolerances import AFTER_SYNC, SHARES

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
_RUN_S = 420

_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(c.isdigit() for c in solution_str) / 8
"""


def number_of_ranks() -> int:
    """Return with how many ranks runs are started."""
    return int(os.environ["GPU_CHECK_NPROC"])


def twenty_steps(sizes: Sizes, device: torch.device) -> Outcome:
    """Twenty steps of GMPO with engines of one device each: the reward rises, engine and trainer
    agree in every step."""
    ranks = number_of_ranks()
    rows = trained(
        sizes,
        f"trainer.n_gpus_per_node={ranks}",
        f"actor.megatron.expert_model_parallel_size={ranks}",
        "trainer.total_training_steps=20",
    )
    return judged(sizes, rows, 20, learns=True)


def engine_apart(sizes: Sizes, device: torch.device) -> Outcome:
    """Three steps with the engine in a process of its own on the trainer's device, which gets its
    weights from the device's memory (on CPU from shared memory)."""
    transport = "ipc" if device.type == "cuda" else "shared_memory"
    rows = trained(
        sizes,
        "trainer.n_gpus_per_node=1",
        "rollout.host=process",
        f"rollout.weight_transport={transport}",
        "trainer.total_training_steps=3",
    )
    return judged(sizes, rows, 3)


def engine_of_two_ranks(sizes: Sizes, device: torch.device) -> Outcome:
    """Three steps with two ranks of a trainer and one engine of both, whose routes are replayed."""
    if number_of_ranks() < 2:
        raise SkippedError("needs two devices")
    rows = trained(
        sizes,
        "trainer.n_gpus_per_node=2",
        "actor.megatron.tensor_model_parallel_size=2",
        "rollout.tensor_model_parallel_size=2",
        "actor.router_replay.mode=R3",
        "trainer.total_training_steps=3",
    )
    return judged(sizes, rows, 3)


def trained(sizes: Sizes, *overrides: str) -> list[dict[str, Any]]:
    """Return the metrics of the steps of a run."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        model = [f"--{key}={value}" for key, value in sizes.run_model.items()]
        _script("make_model").main(["--out", str(folder / "model"), *model])
        rows = ("--high", "40", "--train", "320", "--val", "8", "--sft", "8")
        _script("make_data").main(["--out", str(folder / "data"), *rows])
        (folder / "reward.py").write_text(_REWARD)
        _python(
            "-m",
            "mcore_rl.train",
            "--config-name",
            "gmpo",
            f"model.path={folder / 'model'}",
            f"data.train_files={folder / 'data' / 'train.parquet'}",
            f"custom_reward_function.path={folder / 'reward.py'}",
            f"trainer.default_local_dir={folder / 'run'}",
            "data.train_batch_size=16",
            "data.max_prompt_length=16",
            "data.max_response_length=8",
            "actor.ppo_mini_batch_size=8",
            "actor.optim.lr=3e-3",
            "rollout.n=4",
            *sizes.run,
            *overrides,
        )
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [row for row in found if "actor/grad_norm" in row]


def judged(
    sizes: Sizes, rows: list[dict[str, Any]], steps: int, *, learns: bool = False
) -> Outcome:
    """Return the outcome of a run of so many steps."""
    apart = [row["mismatch/logprob_abs_diff/mean"] for row in rows]
    rewards = [row["reward/mean"] for row in rows]
    part = max(1, len(rows) // 4)
    first, last = sum(rewards[:part]) / part, sum(rewards[-part:]) / part
    values: Values = {
        "steps": len(rows),
        "mean_logprob_difference": max(apart),
        "first_reward": first,
        "last_reward": last,
        "last_step_s": rows[-1]["time/step"],
    }
    bounds = [
        Bound("steps_missing", steps - len(rows), 0, "the run was to go to its end"),
        *bounded(
            {"mean_logprob_difference": max(apart)},
            AFTER_SYNC[sizes.engine_dtype] * SHARES["the mean"],
            "what a run starts with (mcore_rl/tolerances.py)",
        ),
    ]
    if learns:
        bounds.append(Bound("first_less_last_reward", first - last, 0, "the reward is to rise"))
    return Outcome(values, bounds)


def _script(name: str) -> Any:
    """Return a script of the quickstart as a module."""
    spec = importlib.util.spec_from_file_location(name, QUICKSTART / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _python(*arguments: Any) -> None:
    """Run a program of Python; its last lines are the message if it fails.

    Raises:
        RuntimeError: if it fails.
    """
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=_RUN_S,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-5:]))
