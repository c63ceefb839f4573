"""Every recipe: its scripts ask for what its configuration says, and its plan fits its devices."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from published_models import QWEN2_5_32B, QWEN2_5_MATH_7B, QWEN2_7B, QWEN3_30B_A3B
from shell_commands import composed, run_script

from mcore_rl.config.checks import check_run
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig
from mcore_rl.plan.report import write_plan

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(script.parent.name for script in EXAMPLES.glob("*/run.sbatch"))
VARIANTS = {"gmpo_qwen3_30b_a3b": ["gmpo_qwen3_30b_a3b_r3"]}
"""Other configurations that a folder's run.sh takes by RECIPE=."""

MODELS = {
    "dapo_qwen2_5_32b": (QWEN2_5_32B, 80),
    "dr_grpo_qwen2_5_math_7b": (QWEN2_5_MATH_7B, 80),
    "gmpo_dapo_qwen2_5_7b": (QWEN2_7B, 80),
    "gmpo_qwen2_5_7b": (QWEN2_7B, 80),
    "gmpo_qwen3_30b_a3b": (QWEN3_30B_A3B, 80),
    "gmpo_qwen3_30b_a3b_8gpu": (QWEN3_30B_A3B, 80),
    "gpg_kl_qwen2_7b": (QWEN2_7B, 80),
    "gpg_qwen2_7b": (QWEN2_7B, 80),
    "grpo": (QWEN2_7B, 80),
}
"""Model and GiB per device of each folder's README."""


def run_recipe(tmp_path, folder, *argv, **variables):
    names = {"MODEL": "M", "TRAIN_DATA": "train.parquet", "VAL_DATA": "val.parquet"}
    script = EXAMPLES / folder / "run.sh"
    stand_ins = "torchrun python"
    return run_script(tmp_path, script, *argv, stand_ins=stand_ins, **{**names, **variables})


def test_the_table_names_every_recipe():
    assert set(MODELS) == set(RECIPES)


@pytest.mark.parametrize("folder", RECIPES)
def test_the_scripts_launch_the_configuration(tmp_path, folder):
    argv = ["actor.optim.lr=2e-6"]
    ended = run_recipe(tmp_path, folder, *argv, NODE_RANK="3", MASTER_ADDR="first")
    assert ended.exit_code == 0, ended.stderr
    (command,) = ended.commands
    cfg = composed(command)
    assert cfg.model.path == "M"
    assert cfg.data.val_files == "val.parquet"
    assert cfg.actor.optim.lr == 2e-6
    options = command[: command.index("-m")]
    assert options[0] == "torchrun"
    assert options[options.index("--nnodes") + 1] == str(cfg.trainer.nnodes)
    assert options[options.index("--nproc-per-node") + 1] == str(cfg.trainer.n_gpus_per_node)
    assert options[options.index("--node-rank") + 1] == "3"
    assert options[options.index("--master-addr") + 1] == "first"
    # The sizes of the scripts are those of the configuration, which a plan reads alone.
    alone = recipe(command[command.index("--config-name") + 1])
    assert alone.trainer.world_size == cfg.trainer.world_size


@pytest.mark.parametrize("folder", RECIPES)
def test_the_batch_job_asks_for_the_nodes_and_runs_the_recipe_on_each(tmp_path, folder):
    script = EXAMPLES / folder / "run.sbatch"
    header = dict(
        re.fullmatch(r"#SBATCH --([\w-]+)(?:=(.*))?", line).groups()
        for line in script.read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    cfg = recipe(header["job-name"])
    assert int(header["nodes"]) == cfg.trainer.nnodes
    assert int(header["gpus-per-node"]) == cfg.trainer.n_gpus_per_node
    assert header["ntasks-per-node"] == "1"
    assert "requeue" in header
    assert header["signal"].startswith("B:USR1@")
    assert cfg.trainer.resume_mode == "auto"
    assert cfg.trainer.save_freq > 0
    ended = run_script(
        tmp_path,
        script,
        "actor.optim.lr=2e-6",
        stand_ins="srun scontrol",
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_NNODES=header["nodes"],
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="n[0-7]",
    )
    assert ended.exit_code == 0, ended.stderr
    (srun,) = [command for command in ended.commands if command[0] == "srun"]
    assert srun[-3:] == ["node", f"examples/{folder}/run.sh", "actor.optim.lr=2e-6"]
    assert (EXAMPLES / folder / "run.sh").stat().st_mode & 0o100


def test_scripts_parse():
    for script in [*EXAMPLES.glob("*/*.sh"), *EXAMPLES.glob("*/*.sbatch")]:
        done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_variable_that_is_missing_is_named(tmp_path):
    ended = run_recipe(tmp_path, "grpo", TRAIN_DATA="")
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: set TRAIN_DATA")
    assert ended.commands == []


def test_lists_of_data_files_and_paths_with_apostrophes_arrive(tmp_path):
    names = {"MODEL": "Ada's", "TRAIN_DATA": "['a.parquet', 'b.parquet']", "VAL_DATA": "c's"}
    (command,) = run_recipe(tmp_path, "grpo", **names).commands
    cfg = composed(command)
    assert cfg.model.path == "Ada's"
    assert cfg.data.train_files == ["a.parquet", "b.parquet"]
    assert cfg.data.val_files == "c's"


def test_a_dry_run_starts_one_process(tmp_path):
    (command,) = run_recipe(tmp_path, "gmpo_qwen3_30b_a3b", "trainer.dry_run=true").commands
    assert command[0] == "python"
    assert composed(command).trainer.world_size == 64


@pytest.mark.parametrize(
    ("name", "folder"),
    [(name, folder) for folder in RECIPES for name in [None, *VARIANTS.get(folder, [])]],
)
def test_the_plan_fits_the_devices_of_the_readme(tmp_path, capsys, name, folder):
    model, device_gib = MODELS[folder]
    model.save_pretrained(tmp_path)
    row = json.dumps({"prompt": "What is 37 + 48? " * 20, "ground_truth": "85"})
    (tmp_path / "train.jsonl").write_text("\n".join([row] * 1024))
    argv = [
        "trainer.dry_run=true",
        f"trainer.device_memory_gib={device_gib}",
        f"model.path={tmp_path}",
        f"data.train_files={tmp_path / 'train.jsonl'}",
    ]
    write_plan(recipe(name or job_name(folder), *argv))
    assert "  fits: " in capsys.readouterr().out
    readme = (EXAMPLES / folder / "README.md").read_text()
    assert f"{device_gib} GB" in readme
    assert "not been run" in readme


def test_the_recipe_for_qwen3_30b_a3b_has_every_parameter_of_its_source():
    cfg = recipe("gmpo_qwen3_30b_a3b")
    assert cfg.algorithm.adv_estimator == "grpo"
    assert cfg.actor.policy_loss.loss_mode == "geo_mean"
    assert (cfg.actor.clip_ratio_low, cfg.actor.clip_ratio_high) == (0.4, 0.4)
    assert not (cfg.actor.use_kl_loss or cfg.algorithm.use_kl_in_reward)
    assert not cfg.algorithm.filter_groups.enable
    data = cfg.data
    assert (data.max_prompt_length, data.max_response_length) == (2048, 8192)
    assert (data.truncation, data.prompt_key) == ("left", "prompt")
    assert (data.train_batch_size, cfg.rollout.n, cfg.actor.ppo_mini_batch_size) == (512, 16, 32)
    buffer = cfg.reward.overlong_buffer
    assert (buffer.enable, buffer.len, buffer.penalty_factor) == (True, 4096, 1.0)
    assert (cfg.rollout.temperature, cfg.rollout.top_p, cfg.rollout.top_k) == (1.0, 1.0, -1)
    val = cfg.rollout.val_kwargs
    assert (val.n, val.do_sample, val.temperature, val.top_p) == (1, True, 1.0, 0.7)
    assert (cfg.rollout.tensor_model_parallel_size, cfg.rollout.max_num_batched_tokens) == (
        4,
        10240,
    )
    assert cfg.rollout.gpu_memory_utilization == 0.8
    megatron = cfg.actor.megatron
    assert (megatron.param_offload, megatron.optimizer_offload) == (True, True)
    assert cfg.actor.ppo_max_token_len_per_gpu == 20480
    optim = cfg.actor.optim
    assert (optim.lr, optim.lr_warmup_steps, optim.weight_decay) == (1e-6, 10, 0.1)
    assert (cfg.actor.entropy_coeff, cfg.actor.grad_clip) == (0.0, 1.0)
    trainer = cfg.trainer
    assert (trainer.total_epochs, trainer.total_training_steps) == (10, 300)
    assert (trainer.test_freq, trainer.save_freq, trainer.log_val_generations) == (10, 10, 10)
    assert trainer.val_before_train
    assert trainer.logger == ["console", "wandb"]
    narrow = recipe("gmpo_qwen3_30b_a3b_r3")
    assert (narrow.actor.clip_ratio_low, narrow.actor.clip_ratio_high) == (0.2, 0.2)
    assert narrow.actor.router_replay.mode == "R3"


def test_the_recipe_for_one_node_trains_as_that_for_eight():
    """All that differs is the layout, how gradients are reduced, and the folder of the run."""
    large, small = recipe("gmpo_qwen3_30b_a3b"), recipe("gmpo_qwen3_30b_a3b_8gpu")
    assert (small.trainer.nnodes, small.trainer.n_gpus_per_node) == (1, 8)
    megatron = replace(
        small.actor.megatron, pipeline_model_parallel_size=2, overlap_grad_reduce=False
    )
    names = {name: getattr(large.trainer, name) for name in ("nnodes", "experiment_name")}
    folder = large.trainer.default_local_dir
    trainer = replace(small.trainer, default_local_dir=folder, **names)
    assert replace(small, actor=replace(small.actor, megatron=megatron), trainer=trainer) == large


def job_name(folder):
    return re.search(r"--job-name=(.*)", (EXAMPLES / folder / "run.sbatch").read_text())[1]


def recipe(name, *argv):
    given = ["model.path=M", "data.train_files=train.parquet", "data.val_files=val.parquet"]
    line = parse_command_line("train", "", ["--config-name", name, *given, *argv])
    cfg = compose_config(RunConfig, line)
    check_run(cfg)
    return cfg
