"""verl's command lines: what their options are here, and that none is passed over in silence."""

from __future__ import annotations

import re
import shlex

import pytest
from omegaconf import DictConfig, OmegaConf

from mcore_rl.config.assignments import Assignment, find_row, translate
from mcore_rl.config.checks import a_critic_is_described_only_where_there_is_one, check_run
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig
from mcore_rl.config.translate import SECTIONS, TABLE, WILDCARD, Refused, Renamed
from mcore_rl.errors import UserError
from mcore_rl.types import Offloads, Part

GMPO = """
data.train_files=dapo-math-17k.parquet data.val_files=aime-2024.parquet data.prompt_key=prompt
data.truncation='left' data.max_prompt_length=2048 data.max_response_length=8192
data.train_batch_size=512 actor_rollout_ref.rollout.n=16 algorithm.adv_estimator=grpo
algorithm.use_kl_in_reward=False algorithm.kl_ctrl.kl_coef=0.0
actor_rollout_ref.actor.use_kl_loss=False actor_rollout_ref.actor.kl_loss_coef=0.0
actor_rollout_ref.actor.clip_ratio_low=0.4 actor_rollout_ref.actor.clip_ratio_high=0.4
actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.use_dynamic_bsz=True
actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480
actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=30720
actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=30720
actor_rollout_ref.rollout.name=vllm actor_rollout_ref.model.path=Qwen3-30B-A3B-Base
actor_rollout_ref.model.enable_gradient_checkpointing=True actor_rollout_ref.actor.optim.lr=1e-6
actor_rollout_ref.actor.optim.lr_warmup_steps=10 actor_rollout_ref.actor.optim.weight_decay=0.1
actor_rollout_ref.actor.ppo_mini_batch_size=32
actor_rollout_ref.actor.fsdp_config.param_offload=True
actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
actor_rollout_ref.actor.entropy_coeff=0 actor_rollout_ref.actor.grad_clip=1.0
actor_rollout_ref.actor.loss_agg_mode=token-mean
actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean
actor_rollout_ref.actor.ulysses_sequence_parallel_size=4
actor_rollout_ref.rollout.gpu_memory_utilization=0.80
actor_rollout_ref.rollout.enable_chunked_prefill=True
actor_rollout_ref.rollout.max_num_batched_tokens=10240
actor_rollout_ref.rollout.temperature=1.0 actor_rollout_ref.rollout.top_p=1.0
actor_rollout_ref.rollout.top_k=-1 actor_rollout_ref.rollout.val_kwargs.temperature=1.0
actor_rollout_ref.rollout.val_kwargs.top_p=0.7 actor_rollout_ref.rollout.val_kwargs.top_k=-1
actor_rollout_ref.rollout.val_kwargs.do_sample=True actor_rollout_ref.rollout.val_kwargs.n=1
actor_rollout_ref.ref.fsdp_config.param_offload=True
actor_rollout_ref.ref.ulysses_sequence_parallel_size=4
actor_rollout_ref.actor.fsdp_config.fsdp_size=32
actor_rollout_ref.actor.checkpoint.save_contents="['model','optimizer','extra']"
reward_model.reward_manager=dapo +reward_model.overlong_buffer.enable=True
+reward_model.overlong_buffer.len=4096 +reward_model.overlong_buffer.penalty_factor=1.0
+reward_model.overlong_buffer.log=False +reward_model.reward_kwargs.max_resp_len=8192
trainer.logger="['console','wandb']" trainer.project_name=DAPO trainer.experiment_name=e
trainer.n_gpus_per_node=8 trainer.nnodes=8 trainer.val_before_train=True trainer.test_freq=10
trainer.save_freq=10 trainer.total_epochs=10 trainer.total_training_steps=300
trainer.default_local_dir=ckpts trainer.resume_mode=auto trainer.log_val_generations=10
"""
"""Qwen3-30B-A3B by GMPO on FSDP, as it was published."""

GPG = """
--config-path=config --config-name='ppo_megatron_trainer.yaml' algorithm.adv_estimator=gpg
data.train_files="['gsm8k/train.parquet', 'math/train.parquet']"
data.val_files="['gsm8k/test.parquet', 'math/test.parquet']" data.train_batch_size=1024
data.max_prompt_length=1024 data.max_response_length=1024 data.filter_overlong_prompts=True
data.truncation='error' actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct
actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.ppo_mini_batch_size=256
actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
actor_rollout_ref.actor.megatron.pipeline_model_parallel_size=2
actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2
actor_rollout_ref.actor.use_gpg_loss=True actor_rollout_ref.actor.use_kl_loss=False
actor_rollout_ref.actor.kl_loss_coef=0.001 actor_rollout_ref.actor.kl_loss_type=low_var_kl
actor_rollout_ref.actor.entropy_coeff=0
actor_rollout_ref.model.enable_gradient_checkpointing=True
actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4
actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.tensor_model_parallel_size=2
actor_rollout_ref.rollout.gpu_memory_utilization=0.6
actor_rollout_ref.rollout.n=5 actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4
actor_rollout_ref.ref.megatron.pipeline_model_parallel_size=2
actor_rollout_ref.ref.megatron.tensor_model_parallel_size=2
algorithm.use_kl_in_reward=False trainer.critic_warmup=0 trainer.logger=['console','wandb']
trainer.project_name='verl_gpg_example_gsm8k_math' trainer.experiment_name='qwen2_7b_megatron'
trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.save_freq=20 trainer.test_freq=5
trainer.total_epochs=15
"""
"""Qwen2-7B by GPG on Megatron, as it was published."""


DAPO = """
--config-name dapo_trainer.yaml data.train_files=dapo-math-17k.parquet
data.val_files=aime-2024.parquet data.prompt_key=prompt data.truncation='left'
data.max_prompt_length=2048 data.max_response_length=2048 data.gen_batch_size=1536
data.train_batch_size=512 actor_rollout_ref.rollout.n=16
actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28
actor_rollout_ref.actor.clip_ratio_c=10.0 algorithm.adv_estimator=grpo
algorithm.kl_ctrl.kl_coef=0.0 algorithm.filter_groups.enable=True
algorithm.filter_groups.metric=acc algorithm.filter_groups.max_num_gen_batches=10
actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.model.path=Qwen/Qwen2.5-Math-7B
+actor_rollout_ref.model.override_config.attention_dropout=0.
+actor_rollout_ref.model.override_config.embd_pdrop=0.
+actor_rollout_ref.model.override_config.resid_pdrop=0.
actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.actor.ppo_micro_batch_size=null
actor_rollout_ref.actor.use_token_level_loss=True reward_model.reward_manager=dapo
custom_reward_function.overlong_buffer.enable=True custom_reward_function.overlong_buffer.len=512
custom_reward_function.overlong_buffer.penalty_factor=1.0 trainer.n_gpus_per_node=8
trainer.nnodes=4 trainer.test_freq=2 trainer.save_freq=2 trainer.resume_mode=disable
"""
"""Qwen2.5-Math-7B by DAPO, as it was published."""


def compose(*argv: str) -> tuple[RunConfig, str]:
    """Return the configuration and the warning."""
    line = parse_command_line("train", "", argv)
    return compose_config(RunConfig, line), line.warning


def overrides(*argv: str) -> list[tuple[str, str]]:
    line = parse_command_line("train", "", argv)
    assert line.warning == ""
    return [(option.key, option.text) for option in line.overrides]


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        compose(*argv)
    text = str(caught.value)
    assert "\n" not in text
    return text


def typed_keys(node: DictConfig, prefix: str = "") -> set[str]:
    keys = set()
    for name in node:
        below = node._get_node(name)
        keys.add(f"{prefix}{name}")
        if isinstance(below, DictConfig):
            keys |= typed_keys(below, f"{prefix}{name}.")
    return keys


KEYS = typed_keys(OmegaConf.structured(RunConfig))
UNTYPED = ("rollout.engine_kwargs", "actor.megatron.override_transformer_config")


def test_no_row_stands_for_a_key_of_this_package():
    """A key that this package gets must lose its row, which would hide it."""
    hidden = {key: row.key for key in KEYS if (row := find_row(key)) is not None}
    assert hidden == {}


def test_an_option_has_one_row():
    keys = [row.key for rows in SECTIONS.values() for row in rows]
    assert sorted(keys) == sorted(set(keys))


def test_whatever_an_option_becomes_is_a_key_of_this_package():
    targets = {row.to for row in TABLE.values() if isinstance(row, Renamed)}
    for row in TABLE.values():
        if not isinstance(row, Renamed):
            pairs = " ".join(row.values.values()).split()
            targets |= {pair.split("=")[0] for pair in pairs}
    unknown = {
        key
        for key in targets
        if key.removesuffix(WILDCARD) not in KEYS and key.rpartition(".")[0] not in UNTYPED
    }
    assert unknown == set()


def test_a_value_that_means_nothing_here_is_named_or_refused_and_a_known_one_is_not():
    for pattern, row in TABLE.items():
        key = pattern.replace(WILDCARD, ".anything")
        if isinstance(row, Renamed):
            continue
        if isinstance(row, Refused):
            with pytest.raises(UserError) as caught:
                translate([Assignment(key, 17, "17")])
            assert str(caught.value) == f"{key}=17 has no equivalent here. {row.fix}"
        else:
            options = [Assignment(key, 17, "17")]
            assert translate(options) == ([], f"not read here: {key} ({row.reason})")
        for value, pairs in row.values.items():
            translated, warning = translate([Assignment(key, value, str(value))])
            assert [f"{option.key}={option.text}" for option in translated] == pairs.split()
            assert warning == ""


def test_the_published_gmpo_recipe_is_read_whole():
    cfg, warning = compose(*shlex.split(GMPO))
    check_run(cfg)
    assert cfg.actor.policy_loss.loss_mode == "geo_mean"
    assert cfg.actor.megatron.context_parallel_size == 4
    assert cfg.actor.megatron.override_transformer_config == {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    assert (cfg.reward.overlong_buffer.enable, cfg.reward.overlong_buffer.len) == (True, 4096)
    assert (cfg.rollout.enable_chunked_prefill, cfg.rollout.max_num_batched_tokens) == (True, 10240)
    assert cfg.actor.megatron.parts == {Part.PARAM, Part.OPTIMIZER}
    assert cfg.ref.megatron.param_offload
    assert warning == (
        "not read here: ref.log_prob_use_dynamic_bsz, rollout.log_prob_use_dynamic_bsz, "
        "ref.log_prob_max_token_len_per_gpu, rollout.log_prob_max_token_len_per_gpu "
        "(log-probabilities are computed in the micro-batches of training); "
        "ref.ulysses_sequence_parallel_size (the reference is laid out as the actor); "
        "actor.fsdp_config.fsdp_size (Megatron shards by actor.megatron); "
        "actor.checkpoint.save_contents (a checkpoint is whole, trainer.export_hf_model); "
        "reward_model.overlong_buffer.log (the penalty is always logged)"
    )


def test_the_published_gpg_recipe_is_read_whole():
    cfg, warning = compose(*shlex.split(GPG))
    check_run(cfg)
    assert cfg.data.train_files == ["gsm8k/train.parquet", "math/train.parquet"]
    assert (cfg.algorithm.adv_estimator, cfg.actor.policy_loss.loss_mode) == ("gpg", "gpg")
    assert cfg.actor.megatron.tensor_model_parallel_size == 2
    assert warning.startswith("not read here: rollout.log_prob_micro_batch_size_per_gpu, ref.log_")


def test_the_published_dapo_recipe_is_read_whole():
    cfg, warning = compose(*shlex.split(DAPO))
    check_run(cfg)
    assert warning == ""
    assert cfg.actor.loss_agg_mode == "token-mean"
    assert (cfg.algorithm.filter_groups.enable, cfg.algorithm.filter_groups.metric) == (True, "acc")
    assert (cfg.reward.overlong_buffer.enable, cfg.reward.overlong_buffer.len) == (True, 512)
    assert "dropout=0.1 has no equivalent here. No pass has dropout." in refusal(
        "model.override_config.attention_dropout=0.1"
    )


@pytest.mark.parametrize(
    ("option", "same"),
    [
        ("actor.use_gpg_loss=True", "actor.policy_loss.loss_mode=gpg"),
        ("rollout.enable_rollout_routing_replay=True", "actor.router_replay.mode=R3"),
        ("actor.megatron.router_replay.mode=R2", "actor.router_replay.mode=R2"),
        ("actor.optim.warmup_style=cosine", "actor.optim.lr_decay_style=cosine"),
        ("actor.fsdp_config.param_offload=True", "actor.megatron.param_offload=True"),
        ("actor.fsdp_config.optimizer_offload=True", "actor.megatron.optimizer_offload=True"),
        ("ref.fsdp_config.param_offload=True", "ref.megatron.param_offload=True"),
        ("critic.model.fsdp_config.param_offload=True", "critic.megatron.param_offload=True"),
        (
            "critic.model.fsdp_config.optimizer_offload=True",
            "critic.megatron.optimizer_offload=True",
        ),
        ("trainer.max_actor_ckpt_to_keep=3", "trainer.max_ckpt_to_keep=3"),
        ("+data.multiturn.messages_key=talk", "data.messages_key=talk"),
        (
            "+actor_rollout_ref.rollout.engine_kwargs.vllm.compilation_config.mode=0",
            "rollout.engine_kwargs.compilation_config.mode=0",
        ),
        (
            "++reward_model.reward_kwargs.max_resp_len=77",
            "data.max_response_length=77",
        ),
    ],
)
def test_an_option_becomes_that_of_this_package(option, same):
    assert overrides(option) == overrides(same)


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("data.train_max_samples=100", "train_max_samples", 100),
        ("data.val_max_samples=-1", "val_max_samples", -1),
        ("trainer.val_only=True", "val_only", True),
        ("+actor_rollout_ref.rollout.stop=['</answer>','<end>']", "stop", ["</answer>", "<end>"]),
    ],
)
def test_an_option_of_verl_bears_its_own_name(option, key, value):
    line = parse_command_line("train", "", [option])
    cfg = compose_config(RunConfig, line)
    section = option.lstrip("+").removeprefix("actor_rollout_ref.").split(".")[0]
    assert getattr(getattr(cfg, section), key) == value
    assert not line.warning


def test_verl_s_options_for_offloading_are_those_of_this_package():
    models = {"actor_rollout_ref.actor": 3, "critic": 3, "actor_rollout_ref.ref": 1}
    names = ("param_offload", "grad_offload", "optimizer_offload")
    given = [
        f"{model}.megatron.{name}=True" for model, count in models.items() for name in names[:count]
    ]
    cfg, warning = compose(*given, "algorithm.adv_estimator=gae", "actor.use_kl_loss=true")
    assert warning == ""
    whole = frozenset({Part.PARAM, Part.GRAD, Part.OPTIMIZER})
    assert cfg.offloads == Offloads(actor=whole | {Part.REFERENCE}, critic=whole)
    cfg, _ = compose("actor.fsdp_config.offload_policy=True")
    assert cfg.offloads == Offloads(actor=whole, reference=Part.PARAM)


def test_a_reference_that_is_not_kept_is_not_offloaded():
    """Without a KL there is none; under adapters it is the weights themselves."""
    for options in ([], ["actor.use_kl_loss=true", "model.lora_rank=8"]):
        cfg, _ = compose("ref.megatron.param_offload=True", *options)
        assert cfg.offloads == Offloads(reference=Part.PARAM)


def test_nothing_of_a_critic_is_offloaded_where_there_is_none():
    cfg, _ = compose("critic.model.fsdp_config.param_offload=True")
    with pytest.raises(UserError, match=r"^critic\.megatron\.param_offload=True is not read with"):
        a_critic_is_described_only_where_there_is_one(cfg)


def test_a_layout_of_its_own_is_refused_to_a_critic_and_a_misspelt_option_unknown():
    assert refusal("critic.megatron.tensor_model_parallel_size=2").endswith(
        "A critic has the layout and options of actor.megatron."
    )
    assert refusal("critic.megatron.param_ofload=True").endswith(
        "Did you mean 'critic.megatron.param_offload'?"
    )


def test_two_names_of_one_key_must_agree():
    replay = "actor_rollout_ref.rollout.enable_rollout_routing_replay=True"
    assert dict(overrides(replay, "actor.router_replay.mode=R3")) == {
        "actor.router_replay.mode": "R3"
    }
    assert refusal(replay, "actor_rollout_ref.actor.megatron.router_replay.mode=R2") == (
        "rollout.enable_rollout_routing_replay and actor.megatron.router_replay.mode set "
        "actor.router_replay.mode to different values. Leave one of them."
    )
    assert "data.max_response_length to different values" in refusal(
        "data.max_response_length=512", "+reward_model.reward_kwargs.max_resp_len=1024"
    )


def test_two_names_of_one_key_are_compared_as_they_resolve():
    same = [
        ["data.max_response_length=512", "rollout.response_length=${data.max_prompt_length}"],
        ["rollout.response_length=${data.max_prompt_length}", "data.max_response_length=512"],
        ["data.max_response_length=512", "rollout.response_length=${data.max_response_length}"],
        ["data.max_response_length=512", "rollout.response_length='${data.max_response_length}'"],
        ["reward_model.reward_kwargs.max_resp_len=512", "rollout.response_length=${rollout.n}"],
        [
            "data.max_response_length=${actor_rollout_ref.rollout.n}",
            "actor_rollout_ref.rollout.response_length=${data.max_prompt_length}",
        ],
    ]
    sizes = ["data.max_prompt_length=512", "rollout.n=512"]
    for options in same:
        assert compose(*sizes, *options)[0].data.max_response_length == 512
    for options in same[:2]:
        assert refusal("data.max_prompt_length=256", *options).endswith(
            "set data.max_response_length to different values. Leave one of them."
        )
    alone = compose(
        "data.max_prompt_length=256", "rollout.response_length=${data.max_prompt_length}"
    )
    assert alone[0].data.max_response_length == 256


def test_an_interpolation_takes_verl_s_prefix_and_one_of_itself_is_refused_in_one_line():
    cfg, _ = compose("rollout.n=6", "trainer.total_epochs=${actor_rollout_ref.rollout.n}")
    assert cfg.trainer.total_epochs == 6
    assert "trainer.total_epochs" in refusal("trainer.total_epochs=${trainer.total_epochs}")


def test_the_last_of_several_values_of_an_option_counts():
    options = [f"actor.ulysses_sequence_parallel_size={size}" for size in (2, 4)]
    assert dict(overrides(*options)) == {"actor.megatron.context_parallel_size": "4"}


@pytest.mark.parametrize(
    ("override", "closest"),
    [
        (
            "actor_rollout_ref.actor.fsdp_config.param_ofload=True",
            "actor.fsdp_config.param_offload",
        ),
        ("reward_model.overlong_bufer.enable=True", "reward_model.overlong_buffer.enable"),
        ("actor_rollout_ref.rollout.log_prob_use_dynamic_bs=True", "log_prob_use_dynamic_bsz"),
    ],
)
def test_a_misspelt_option_names_the_closest(override, closest):
    text = refusal(override)
    assert "there is no such key. Did you mean '" in text
    assert text.endswith(f"{closest}'?")


@pytest.mark.parametrize("override", ["algorithm.use_ppo=True", "algorithm.pf_ppo_=1"])
def test_no_hint_names_an_option_that_is_always_refused(override):
    assert refusal(override) == f"{override.split('=')[0]}: there is no such key."


def test_what_a_refusal_tells_to_set_is_a_key_of_this_package():
    sections = "|".join(sorted({key.split(".")[0] for key in KEYS}))
    for option, row in TABLE.items():
        text = row.fix if isinstance(row, Refused) else getattr(row, "reason", "")
        for key in re.findall(rf"(?<![\w.])(?:{sections})\.[a-z][\w.]*\w", text):
            assert key in KEYS, f"{option}: {key}"
