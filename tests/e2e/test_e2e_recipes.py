"""Every recipe by the scripts that start it, at tiny size:

    submit.sh -> sbatch -> job.sbatch -> srun -> run.sh -> torchrun, or Ray -> two steps

Slurm's programs are stand-ins; what is cut down comes by the command line.

One by default, as each starts many interpreters; all of them with
`pytest -m 'slow or not slow' tests/e2e/test_e2e_recipes.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.e2e import commands
from tests.tiny_models import save_tiny_checkpoint

ROOT = Path(__file__).parents[2]
DENSE = [
    "dapo_qwen2_5_32b",
    "dr_grpo_qwen2_5_math_7b",
    "gmpo_dapo_qwen2_5_7b",
    "gmpo_qwen2_5_7b",
    "gpg_kl_qwen2_7b",
    "gpg_qwen2_7b",
    "grpo_lora_qwen2_5_7b",
    "grpo_qwen2_7b",
]
EXPERTS = [
    "gmpo_deepseek_v3",
    "gmpo_qwen3_235b_a22b",
    "gmpo_qwen3_30b_a3b",
    "gmpo_qwen3_30b_a3b_8gpu",
    "gmpo_qwen3_30b_a3b_r3",
]
DEFAULT = "gmpo_qwen3_30b_a3b_r3"
TINY = [
    "trainer.nnodes=1",
    "trainer.n_gpus_per_node=1",
    "trainer.logger=[console]",
    "trainer.total_training_steps=2",
    "actor.megatron.dtype=float32",
    "actor.megatron.tensor_model_parallel_size=1",
    "actor.megatron.pipeline_model_parallel_size=1",
    "actor.megatron.expert_model_parallel_size=1",
    "actor.ppo_mini_batch_size=2",
    "rollout.tensor_model_parallel_size=1",
    "rollout.kv_cache_memory_bytes=33554432",
    "rollout.n=3",
    "data.train_batch_size=4",
    "data.max_prompt_length=16",
    "data.max_response_length=8",
    "reward.num_workers=1",
]
# As Slurm does it, for one node: runs the script with its arguments in the job's environment.
SBATCH = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    case $1 in --nodes=*) export SLURM_NNODES=${1#*=} ;; esac
    shift
done
export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n1
exec bash "$@"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" &
TASK=$!
trap 'kill -USR1 "$TASK"' USR1
trap 'kill -TERM "$TASK"' TERM
while kill -0 "$TASK" 2> /dev/null; do wait "$TASK" && CODE=0 || CODE=$?; done
exit "$CODE"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi
"""


def test_the_lists_name_every_recipe():
    """A recipe is an experiment with a name."""
    files = (ROOT / "configs").glob("*.yaml")
    named = {file.stem for file in files if "experiment_name:" in file.read_text()}
    assert named - {"quickstart", "quickstart_sft"} == {*DENSE, *EXPERTS}


@pytest.fixture(scope="module")
def dense(files, tmp_path_factory):
    """A Qwen2 with the vocabulary of the other tiny model, of a size that vLLM computes on CPU."""
    folder = tmp_path_factory.mktemp("recipes") / "qwen2"
    vocab_size = json.loads((files.model / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_tiny_checkpoint("qwen2", folder, vocab_size=vocab_size, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (files.model / name).exists():
            shutil.copy(files.model / name, folder)
    return folder


def start(files, tmp_path, recipe, model, *overrides, launcher="torchrun") -> subprocess.Popen[str]:
    """Submit a recipe to the stand-ins."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "REQUEUED": str(tmp_path / "requeued"),
        "LAUNCHER": launcher,
        "MODEL": str(model),
        "TRAIN_DATA": str(files.data / "train.parquet"),
        "VAL_DATA": str(files.data / "val.parquet"),
    }
    given = [f"custom_reward_function.path={files.reward}", "reward.on_error=zero"]
    given.append(f"trainer.default_local_dir={tmp_path / 'run'}")
    return subprocess.Popen(
        ["examples/launch/submit.sh", recipe, *TINY, *given, *overrides],
        cwd=ROOT,
        env=commands.ENVIRONMENT | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def overrides_of(recipe):
    """Return what else is to be cut down."""
    text = (ROOT / "configs" / f"{recipe}.yaml").read_text()
    found = ["rollout.max_num_batched_tokens=4096"] if recipe in EXPERTS else []
    if "gen_batch_size" in text:
        found.append("data.gen_batch_size=8")
    if "dapo" in recipe or recipe in EXPERTS:
        found.append("reward.overlong_buffer.len=4")
    if "expert" in text or recipe in EXPERTS:
        found.append("actor.megatron.expert_tensor_parallel_size=1")
    if "val_kwargs" in text and "n: 32" in text:
        found.append("rollout.val_kwargs.n=2")
    return found


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=[] if name == DEFAULT else [pytest.mark.slow])
        for name in [*DENSE, *EXPERTS]
    ],
)
@pytest.mark.timeout(commands.TEST_LIMIT_S)
def test_a_recipe_trains_two_steps_by_its_scripts(files, dense, tmp_path, recipe):
    model = files.model if recipe in EXPERTS else dense
    done = commands.finish(start(files, tmp_path, recipe, model, *overrides_of(recipe)))
    assert done.returncode == 0, done.stderr
    lines = commands.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all("actor/grad_norm" in line for line in lines[:2])
    assert (tmp_path / "run" / "hf_model" / "config.json").exists()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow  # Ray gives its own processes 15 s to start, which a busy machine does not keep
@pytest.mark.timeout(commands.TEST_LIMIT_S)
def test_a_recipe_trains_on_ray_nodes_that_its_job_starts(files, dense, tmp_path):
    """They ask for the job's token, and are gone with it."""
    before = ray_processes()
    job = start(files, tmp_path, "gmpo_qwen2_5_7b", dense, launcher="ray")
    done = commands.finish(job)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in commands.read_metrics(tmp_path / "run")] == [0, 1, 2]
    left = psutil.wait_procs(ray_processes() - before, timeout=60)[1]
    assert left == []


def ray_processes():
    """Return Ray's processes on this machine."""
    found = psutil.process_iter(["name"])
    return {process for process in found if process.info["name"] in ("raylet", "gcs_server")}


@pytest.mark.timeout(commands.TEST_LIMIT_S)
def test_a_job_whose_time_is_up_saves_ends_and_is_queued_again(files, dense, tmp_path):
    """The signal comes to the batch shell alone, as `--signal=B:USR1@300` has it."""
    endless = ["trainer.total_training_steps=100000", "trainer.save_freq=100000"]
    job = start(files, tmp_path, "gmpo_qwen2_5_7b", dense, *endless)
    commands.wait_for(lambda: len(commands.read_metrics(tmp_path / "run")) > 1, job)
    job.send_signal(signal.SIGUSR1)
    done = commands.finish(job)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("time is up: the run saves and ends")
    assert "ended as asked" in done.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    step = (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text()
    assert int(step) == len(commands.read_metrics(tmp_path / "run"))
