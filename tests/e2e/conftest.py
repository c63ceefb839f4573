"""A tiny mixture of experts and its data, made by the quickstart's scripts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.prepared import PreparedProcess

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"

# The random model never adds right, so it is rewarded for digits; one prompt's reward is broken.
REWARD = """
BROKEN = "{broken}"

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if ground_truth == BROKEN:
        raise ValueError("no score for this one")
    return {{"score": sum(c.isdigit() for c in solution_str) / 8, "length": len(solution_str)}}
"""


@dataclass(frozen=True)
class Files:
    """What the commands are given."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def reward(self) -> Path:
        return self.root / "reward.py"

    def argv(self, run_dir: Path, *overrides: str) -> list[str]:
        """Return the arguments of a small GMPO run of two processes with expert parallelism."""
        return [
            "--config-name",
            "gmpo",
            f"model.path={self.model}",
            f"data.train_files={self.data / 'train.parquet'}",
            f"data.val_files={self.data / 'val.parquet'}",
            f"custom_reward_function.path={self.reward}",
            f"trainer.default_local_dir={run_dir}",
            "data.train_batch_size=8",
            "data.max_prompt_length=16",
            "data.max_response_length=8",
            "actor.ppo_mini_batch_size=4",
            "actor.optim.lr=3e-3",
            "actor.megatron.dtype=float32",
            "actor.megatron.expert_model_parallel_size=2",
            "rollout.n=4",
            "rollout.kv_cache_memory_bytes=33554432",
            "reward.on_error=zero",
            "trainer.n_gpus_per_node=2",
            "trainer.total_training_steps=4",
            "trainer.test_freq=2",
            *overrides,
        ]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, QUICKSTART / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    made = Files(tmp_path_factory.mktemp("e2e"))
    sizes = {
        "hidden-size": 64,
        "intermediate-size": 64,
        "heads": 2,
        "kv-heads": 1,
        "experts": 4,
        "moe-intermediate-size": 32,
        "max-position-embeddings": 64,
        "initializer-range": 0.2,
    }
    argv = [item for key, value in sizes.items() for item in (f"--{key}", str(value))]
    load_script("make_model").main(["--out", str(made.model), *argv])
    rows = ["--high", "19", "--train", "32", "--val", "8", "--sft", "32"]
    load_script("make_data").main(["--out", str(made.data), *rows])
    import pyarrow.parquet as pq

    # 32 prompts in 4 steps of 8: each is seen once, the broken one too.
    broken = pq.read_table(made.data / "train.parquet")["ground_truth"][0].as_py()
    made.reward.write_text(REWARD.format(broken=broken))
    return made


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Return the process that forks commands: `prepared.run(*argv)`."""
    process = PreparedProcess(tmp_path_factory.mktemp("huggingface"))
    yield process
    process.close()
