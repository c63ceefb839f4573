"""`examples/grpo/train.sh`: its options and variables become the configuration that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.examples.shell_commands import composed, run_script

pytestmark = pytest.mark.starts_processes

TRAIN = Path(__file__).parents[3] / "examples" / "grpo" / "train.sh"


def train(tmp_path, *argv, **variables):
    return run_script(tmp_path, TRAIN, *argv, stand_ins="python", **variables)


def config_of(tmp_path, *argv, **variables) -> Any:
    (command,) = train(tmp_path, *argv, **variables).commands
    return composed(command)


def test_the_defaults_are_those_of_the_help(tmp_path):
    cfg = config_of(tmp_path, "--model", "M")
    assert cfg.model.path == "M"
    assert cfg.rollout.n == 5
    assert cfg.algorithm.adv_estimator == "grpo"
    assert cfg.algorithm.norm_adv_by_std_in_grpo is True
    assert cfg.actor.policy_loss.loss_mode == "vanilla"
    assert cfg.actor.use_kl_loss is True
    assert cfg.actor.kl_loss_coef == 0.001
    assert cfg.actor.kl_loss_type == "low_var_kl"
    assert cfg.actor.optim.lr == 1e-6
    assert (cfg.data.train_batch_size, cfg.actor.ppo_mini_batch_size) == (256, 256)
    assert cfg.data.max_response_length == 1024
    assert cfg.trainer.total_epochs == 15
    assert cfg.trainer.default_local_dir == "./outputs/checkpoints"
    assert cfg.custom_reward_function.path is None
    help_text = train(tmp_path, "--help").stdout
    for text in ("ROLLOUT_N, 5", "NORM_ADV_BY_STD=true", "USE_KL_LOSS=true", "KL_LOSS_COEF, 0.001",
                 "KL_LOSS_TYPE=low_var_kl", "TRAIN_BATCH_SIZE=256", "LEARNING_RATE, 1e-6",
                 "TOTAL_EPOCHS, 15", "MAX_RESPONSE_LENGTH=1024"):  # fmt: skip
        assert text in help_text


def test_the_options_of_the_documented_command_arrive(tmp_path):
    cfg = config_of(
        tmp_path,
        *["--model", "M", "--rollout_n", "8", "--epochs", "20", "--reward_func", "./my_reward.py"],
        *["--n_gpus", "8", "--kl_coef", "0.01", "--lr", "5e-7"],
        *["actor_rollout_ref.actor.entropy_coeff=0.001", "rollout.n=9"],
    )
    assert cfg.trainer.total_epochs == 20
    assert cfg.custom_reward_function.path == "./my_reward.py"
    assert cfg.trainer.n_gpus_per_node == 8
    assert cfg.actor.kl_loss_coef == 0.01
    assert cfg.actor.optim.lr == 5e-7
    assert cfg.actor.entropy_coeff == 0.001
    assert cfg.rollout.n == 9  # an override wins


def test_variables_and_paths_of_any_kind_arrive(tmp_path):
    cfg = config_of(
        tmp_path,
        "--model=/models/a b, c=[1]",
        "--train_data=my data.json",
        ROLLOUT_N="3",
        NORM_ADV_BY_STD="false",
        USE_KL_LOSS="false",
        TRAIN_BATCH_SIZE="64",
        VAL_DATA="val.json",
        OUTPUT="out dir",
        N_GPUS="2",
    )
    assert cfg.model.path == "/models/a b, c=[1]"
    assert cfg.data.train_files == "my data.json"
    assert cfg.data.val_files == "val.json"
    assert cfg.rollout.n == 3
    assert cfg.algorithm.norm_adv_by_std_in_grpo is False
    assert cfg.actor.use_kl_loss is False
    assert cfg.actor.ppo_mini_batch_size == 64
    assert cfg.trainer.default_local_dir == "out dir"
    assert cfg.trainer.world_size == 2


def test_lists_of_data_files_and_paths_with_apostrophes_arrive(tmp_path):
    cfg = config_of(
        tmp_path,
        *["--model", "Ada's", "--train_data", "['a.json', 'b.json']"],
        *["--reward_func", "it's.py", "--output", "Ada's runs"],
        VAL_DATA="[c.json]",
    )
    assert cfg.model.path == "Ada's"
    assert cfg.data.train_files == ["a.json", "b.json"]
    assert cfg.data.val_files == ["c.json"]
    assert cfg.custom_reward_function.path == "it's.py"
    assert cfg.trainer.default_local_dir == "Ada's runs"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--model", "M", "--rolout_n", "8"], "--rolout_n is no option"),
        (["--model", "M", "-n", "8"], "-n is no option"),
        (["--model", "M", "--lr"], "--lr needs a value"),
        (["--model", "M", "8"], "8 is neither"),
        ([], "--model is missing"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, argv, named):
    ended = train(tmp_path, *argv)
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {named}")
    assert ended.commands == []


def test_cuda_devices_are_counted_and_cpus_train_in_float32(tmp_path):
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: a'; echo 'GPU 1: b'\n")
    fake.chmod(0o755)
    on_gpus = config_of(tmp_path, "--model", "M")
    assert (on_gpus.trainer.world_size, on_gpus.actor.megatron.dtype) == (2, "bfloat16")
    fake.write_text("#!/bin/sh\nexit 1\n")
    on_cpu = config_of(tmp_path, "--model", "M")
    assert (on_cpu.trainer.world_size, on_cpu.actor.megatron.dtype) == (1, "float32")
