"""Command lines of verl, as people type them, with this package's module in place of verl's.

Only folders and sizes are other ones; models are named as on the hub and found in a cache of it.
What the options become is tested with the configuration.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e import commands
from tests.hub_cache import COMMIT, put_model

pytestmark = pytest.mark.timeout(commands.TEST_LIMIT_S)

GMPO = """
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean \
    actor_rollout_ref.actor.clip_ratio_low=0.4 \
    actor_rollout_ref.actor.clip_ratio_high=0.4 \
    actor_rollout_ref.model.path=Qwen/Qwen2.5-7B \
    actor_rollout_ref.rollout.n=8 \
    data.train_files="['$DATA/train.parquet']" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.enable_chunked_prefill=True \
    +reward_model.reward_kwargs.overlong_buffer_cfg.enable=True \
    +reward_model.reward_kwargs.overlong_buffer_cfg.len=4 \
    +reward_model.reward_kwargs.overlong_buffer_cfg.log=False \
    trainer.logger='["console"]' \
    trainer.total_epochs=15 $@
"""

GPG_WITH_KL = """
python3 -m verl.trainer.main_ppo --config-path=config \
    --config-name='ppo_megatron_trainer.yaml' \
    algorithm.adv_estimator=gpg \
    actor_rollout_ref.actor.policy_loss.loss_mode=gpg \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.01 \
    algorithm.use_kl_in_reward=False \
    data.train_files="['$DATA/texts.jsonl', '$DATA/train.parquet']" \
    data.filter_overlong_prompts=True \
    data.truncation='error' \
    actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct \
    actor_rollout_ref.model.lora_rank=8 \
    actor_rollout_ref.model.lora_alpha=16 \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 \
    actor_rollout_ref.actor.entropy_coeff=0 \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.fsdp_config.param_offload=False \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.n=5 \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16 \
    actor_rollout_ref.ref.fsdp_config.param_offload=true \
    trainer.critic_warmup=0 \
    trainer.logger=['console'] \
    trainer.total_epochs=15 $@
"""

GPG = """
python3 -m verl.trainer.main_ppo --config-path=config \
    --config-name='ppo_megatron_trainer.yaml' \
    algorithm.adv_estimator=gpg \
    actor_rollout_ref.actor.use_gpg_loss=True \
    actor_rollout_ref.actor.use_kl_loss=False \
    actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \
    algorithm.use_kl_in_reward=False \
    data.train_files="['$DATA/texts.jsonl', '$DATA/train.parquet']" \
    data.filter_overlong_prompts=True \
    actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=1 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=5 \
    trainer.logger=['console'] \
    trainer.total_epochs=15 $@
"""

GMPO_DAPO = """
python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    algorithm.filter_groups.enable=True \
    algorithm.filter_groups.metric=acc \
    algorithm.filter_groups.max_num_gen_batches=10 \
    data.gen_batch_size=8 \
    data.truncation='left' \
    data.train_files=$DATA/train.parquet \
    data.val_files=$DATA/aime.jsonl \
    actor_rollout_ref.model.path=Qwen/Qwen2.5-7B@main \
    actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean \
    actor_rollout_ref.actor.clip_ratio_low=0.4 \
    actor_rollout_ref.actor.clip_ratio_high=0.4 \
    actor_rollout_ref.rollout.n=16 \
    reward_model.reward_manager=dapo \
    +reward_model.reward_kwargs.overlong_buffer_cfg.enable=True \
    +reward_model.reward_kwargs.overlong_buffer_cfg.len=4 \
    +reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor=1.0 \
    +reward_model.reward_kwargs.max_resp_len='${data.max_response_length}' \
    trainer.logger=['console'] \
    trainer.total_epochs=15 $@
"""

COMMANDS = {"gmpo": GMPO, "gpg": GPG, "gpg_kl": GPG_WITH_KL, "gmpo_dapo": GMPO_DAPO}
# Without a model: what it says is not what the trainer computes.
FAKE = ("rollout.name=fake", "rollout.logprob_tolerance=1000")

SMALLER = (
    "data.train_batch_size=8",
    "data.max_prompt_length=16",
    "data.max_response_length=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.megatron.dtype=float32",
    "trainer.total_training_steps=1",
    "trainer.n_gpus_per_node=1",
    "trainer.export_hf_model=false",
)


def write_texts(file: Path, rows: list[dict]) -> None:
    """Write rows with text as prompts, and the answer where verl's files have it."""
    changed = [
        {
            "data_source": row["data_source"],
            "prompt": row["prompt"][0]["content"],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": row["ground_truth"]},
            "extra_info": {"index": index},
        }
        for index, row in enumerate(rows)
    ]
    file.write_text("\n".join(json.dumps(row) for row in changed))


def arguments(script: str, environment: dict[str, str], *more: str) -> list[str]:
    """Return what the shell gives to the trainer, with `more` in place of `$@`."""
    done = subprocess.run(
        [
            "bash",
            "-c",
            script.replace("python3 -m verl.trainer.main_ppo", r"printf '%s\0'"),
            "bash",
            *more,
        ],
        env=commands.ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.split("\0")[:-1]


@pytest.fixture(scope="module", autouse=True)
def models_of_the_hub(files, prepared):
    for model in ("Qwen/Qwen2.5-7B", "Qwen/Qwen2-7B-Instruct"):
        put_model(prepared.hub / "hub", model, files.model)


@pytest.mark.parametrize(
    ("name", "more", "unread"),
    [
        (
            "gmpo",
            (),
            ["reward_model.reward_kwargs.overlong_buffer_cfg.log (the penalty is always logged)"],
        ),
        ("gpg", FAKE, []),
        (
            "gpg_kl",
            FAKE,
            [
                "ref.log_prob_micro_batch_size_per_gpu (log-probabilities are computed in the "
                "micro-batches of training)",
                "ref.megatron.param_offload (no frozen copy is kept)",
            ],
        ),
        ("gmpo_dapo", FAKE, []),
    ],
)
def test_a_command_line_of_verl_trains(files, prepared, tmp_path, name, more, unread):
    rows = pq.read_table(files.data / "train.parquet").to_pylist()
    data = tmp_path / "data"
    data.mkdir()
    write_texts(data / "texts.jsonl", rows[:16])
    write_texts(data / "aime.jsonl", [row | {"data_source": "aime24"} for row in rows[:2]])
    pq.write_table(pq.read_table(files.data / "train.parquet").slice(16), data / "train.parquet")
    # The random model answers nothing right: it is rewarded for digits, except for one prompt.
    broken = ("reward.on_error=zero", "reward.max_failed_frac=1")
    folders = (
        f"custom_reward_function.path={files.reward}",
        f"trainer.default_local_dir={tmp_path / 'run'}",
    )
    where = {"DATA": str(data)}
    argv = arguments(COMMANDS[name], where, *SMALLER, *broken, *more, *folders)
    done = prepared.run(*argv, environment=where)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if " not read here: " in line]
    assert [line.partition(" not read here: ")[2] for line in warnings] == unread
    (metrics,) = (m for m in commands.read_metrics(tmp_path / "run") if "actor/pg_loss" in m)
    assert metrics["actor/grad_norm"] > 0
    assert ("actor/kl_loss" in metrics) == (name == "gpg_kl")
    assert ("reward/overlong_penalty" in metrics) == (name in ("gmpo", "gmpo_dapo"))
    assert ("eval/aime24/accuracy" in metrics) == (name == "gmpo_dapo")
    assert ("rollout/num_gen_batches" in metrics) == (name == "gmpo_dapo")
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert re.search(rf"path: Qwen/Qwen2(\.5-7B|-7B-Instruct)@{COMMIT}\n", config)
