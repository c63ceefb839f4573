"""Steps of TRL's GRPOTrainer, for `rl_step.py`; runs in an environment without this package.

    TRL_PYTHON benchmarks/rl_step_trl.py '{"model": ..., "prompts": ..., ...}'

Prints the seconds of every step and what its log says of lengths, as one line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Takes the time at the end of every step."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.times.append(time.perf_counter())


def load_reward(path: str) -> Any:
    """Return the reward as TRL calls it: the same function as on the other side."""
    spec = importlib.util.spec_from_file_location("reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def reward(completions: list[Any], ground_truth: list[str], **rest: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        pairs = zip(texts, ground_truth, strict=True)
        return [module.compute_score("", text, truth) for text, truth in pairs]

    return reward


def main() -> None:
    given = json.loads(sys.argv[1])
    num_samples = given["prompts"] * given["n"]
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    config = GRPOConfig(
        output_dir=given["folder"],
        max_steps=given["steps"],
        per_device_train_batch_size=num_samples,
        num_generations=given["n"],
        max_completion_length=given["response"],
        learning_rate=given["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        shuffle_dataset=False,
        seed=0,
    )
    clock = Clock()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=load_reward(given["reward"]),
        args=config,
        train_dataset=Dataset.from_list(given["rows"]),
        processing_class=AutoTokenizer.from_pretrained(given["model"]),
        callbacks=[clock],
    )
    trainer.train()
    lengths = [
        [line["completions/min_length"], line["completions/max_length"]]
        for line in trainer.state.log_history
        if "completions/min_length" in line
    ]
    seconds = [later - sooner for sooner, later in zip(clock.times, clock.times[1:], strict=False)]
    print(json.dumps({"seconds": seconds, "lengths": lengths, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
