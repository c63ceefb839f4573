"""Every rule that spans sections refuses what it forbids, names the key, and lets the rest pass."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcore_rl.algorithms.advantages import ADVANTAGES
from mcore_rl.config import checks
from mcore_rl.config.checks import check_eval, check_run, check_sft
from mcore_rl.config.compose import compose_config, parse_command_line
from mcore_rl.config.run import RunConfig, SftRunConfig, train_layout
from mcore_rl.data.packing import SequenceCount, TokenBudget
from mcore_rl.errors import UserError
from mcore_rl.types import Layout
from mcore_rl.weight_sync.base import TRANSPORTS, Distance

NAMED = ["model.path=m", "data.train_files=d"]
CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(file.stem for file in CONFIGS.glob("*.yaml") if "sft" not in file.stem)

OVERRIDE = "+actor.megatron.override_transformer_config"
PP2 = ["trainer.n_gpus_per_node=2", "actor.megatron.pipeline_model_parallel_size=2"]
STOPPING = ["rollout.host=process", "rollout.stop_stragglers=true"]
CP2 = ["trainer.n_gpus_per_node=2", "actor.megatron.context_parallel_size=2"]

# rule: (overrides that break it, how its message begins, the nearest overrides that keep it)
RULES = {
    "a_model_is_named": (
        ["data.train_files=d"],
        "model.path=None is not set.",
        [],
    ),
    "training_data_is_named": (
        ["model.path=m"],
        "data.train_files=None is not set.",
        ["data.train_files=[d,e]"],
    ),
    "parallel_sizes_divide_the_workers": (
        ["trainer.n_gpus_per_node=4", "actor.megatron.tensor_model_parallel_size=3"],
        "trainer.n_gpus_per_node * trainer.nnodes=4 is not a multiple of tensor 3 x pipeline 1",
        ["trainer.n_gpus_per_node=6", "actor.megatron.tensor_model_parallel_size=3"],
    ),
    "a_critic_is_described_only_where_there_is_one": (
        ["critic.optim.lr=1e-4"],
        "critic.optim.lr=0.0001 is not read with algorithm.adv_estimator=grpo",
        ["critic.optim.lr=1e-4", "algorithm.adv_estimator=gae", "trainer.critic_warmup=3"],
    ),
    "minibatches_of_the_critic_divide_a_step": (
        [
            "algorithm.adv_estimator=gae",
            "data.train_batch_size=512",
            "critic.ppo_mini_batch_size=200",
        ],
        "critic.ppo_mini_batch_size=200 does not divide data.train_batch_size=512.",
        [
            "algorithm.adv_estimator=gae",
            "data.train_batch_size=512",
            "critic.ppo_mini_batch_size=64",
        ],
    ),
    "groups_that_are_filtered_have_several_samples": (
        [
            "algorithm.filter_groups.enable=true",
            "algorithm.adv_estimator=reinforce_plus_plus",
            "rollout.n=1",
        ],
        "rollout.n=1 leaves algorithm.filter_groups nothing to compare.",
        ["algorithm.filter_groups.enable=true", "rollout.n=2"],
    ),
    "the_best_checkpoint_is_told_by_a_validation_that_happens": (
        ["trainer.max_ckpt_to_keep=1", "trainer.best_ckpt_metric=eval/math/accuracy"],
        "trainer.best_ckpt_metric='eval/math/accuracy' is of a validation, and there is none while",
        ["trainer.max_ckpt_to_keep=1", "trainer.best_ckpt_metric=actor/loss"],
    ),
    "groups_are_filtered_by_what_is_known_by_then": (
        [
            "algorithm.filter_groups.enable=true",
            "algorithm.filter_groups.metric=seq_final_reward",
            "algorithm.use_kl_in_reward=true",
        ],
        "algorithm.filter_groups.metric='seq_final_reward' is not known while groups are collected",
        [
            "algorithm.filter_groups.enable=true",
            "algorithm.filter_groups.metric=seq_final_reward",
        ],
    ),
    "stragglers_are_stopped_where_more_is_drawn_than_trains": (
        [*STOPPING, "data.gen_batch_size=1024"],
        "data.gen_batch_size=1024 leaves no group that rollout.stop_stragglers could stop. Set it "
        "above data.train_batch_size=1024.",
        [*STOPPING, "data.gen_batch_size=1025"],
    ),
    "stragglers_are_stopped_before_they_are_scored": (
        [
            *(*STOPPING, "data.gen_batch_size=1025"),
            *("algorithm.filter_groups.enable=true", "rollout.n=2"),
        ],
        "rollout.stop_stragglers=True stops groups when enough have ended, and with "
        "algorithm.filter_groups.enable=true how many are enough",
        [*STOPPING, "data.gen_batch_size=1025"],
    ),
    "prompts_are_drawn_in_other_batches_only_to_be_chosen": (
        ["data.gen_batch_size=8"],
        "data.gen_batch_size=8 is not read without algorithm.filter_groups.enable or "
        "rollout.stop_stragglers. Remove it.",
        ["data.gen_batch_size=8", "algorithm.filter_groups.enable=true", "rollout.n=2"],
    ),
    "an_adaptive_kl_coefficient_stays_positive": (
        [
            "algorithm.use_kl_in_reward=true",
            "algorithm.kl_ctrl.type=adaptive",
            "algorithm.kl_ctrl.horizon=256",  # 1 - 0.2 * 1280 / 256 = 0
            "data.train_batch_size=256",
            "rollout.n=5",
        ],
        "algorithm.kl_ctrl.horizon=256 would let one step of 1280 samples turn the coefficient to",
        [
            "algorithm.use_kl_in_reward=true",
            "algorithm.kl_ctrl.type=adaptive",
            "algorithm.kl_ctrl.horizon=257",
            "data.train_batch_size=256",
            "rollout.n=5",
        ],
    ),
    "the_overlong_buffer_fits_in_a_response": (
        ["reward.overlong_buffer.enable=true", "reward.overlong_buffer.len=2000"],
        "reward.overlong_buffer.len=2000 is more than data.max_response_length=1024.",
        ["reward.overlong_buffer.enable=true", "reward.overlong_buffer.len=1024"],
    ),
    "groups_are_large_enough": (
        ["algorithm.adv_estimator=grpo_passk", "rollout.n=1"],
        "rollout.n=1 is too few samples per prompt for algorithm.adv_estimator=grpo_passk.",
        ["algorithm.adv_estimator=grpo_passk", "rollout.n=2"],
    ),
    "pipelines_are_interleaved_only_with_stages": (
        ["actor.megatron.virtual_pipeline_model_parallel_size=2"],
        "actor.megatron.virtual_pipeline_model_parallel_size=2 needs",
        [
            "trainer.n_gpus_per_node=2",
            "actor.megatron.pipeline_model_parallel_size=2",
            "actor.megatron.virtual_pipeline_model_parallel_size=2",
        ],
    ),
    "overrides_leave_alone_what_others_decide": (
        [f"{OVERRIDE}.softmax_scale=0.5"],
        f"{OVERRIDE.lstrip('+')}.softmax_scale=0.5 would train another model than the engine "
        "samples from. Remove it: config.json decides.",
        [f"{OVERRIDE}.recompute_granularity=selective", f"{OVERRIDE}.moe_permute_fusion=true"],
    ),
    "adapters_hang_on_layers_of_their_own": (
        ["model.lora_rank=8", "actor.megatron.transformer_impl=transformer_engine"],
        "actor.megatron.transformer_impl='transformer_engine' has no layers that model.lora_rank=8"
        " could adapt. Use local.",
        ["model.lora_rank=8", "model.lora_alpha=32", "model.target_modules=[o_proj]"],
    ),
    "syncs_of_adapters_are_chosen_only_where_there_are_some": (
        ["rollout.lora_sync=merged"],
        "rollout.lora_sync='merged' is not read without model.lora_rank. Leave it out.",
        ["rollout.lora_sync=adapter", "model.lora_rank=8"],
    ),
    "recorded_routes_are_replayed": (
        ["actor.router_replay.mode=R2", "data.train_batch_size=256"],
        "actor.router_replay.mode='R2' has nothing to replay in steps of one update.",
        ["actor.router_replay.mode=R2", "data.train_batch_size=512"],
    ),
    "minibatches_divide_a_step": (
        ["data.train_batch_size=100", "actor.ppo_mini_batch_size=64"],
        "actor.ppo_mini_batch_size=64 does not divide data.train_batch_size=100.",
        ["data.train_batch_size=128", "actor.ppo_mini_batch_size=64"],
    ),
    "a_micro_batch_holds_the_longest_sample": (
        ["actor.ppo_max_token_len_per_gpu=2047"],
        "actor.ppo_max_token_len_per_gpu=2047 is less than "
        "data.max_prompt_length + data.max_response_length = 2048.",
        ["actor.ppo_max_token_len_per_gpu=2048"],
    ),
    "a_micro_batch_of_the_critic_holds_the_longest_sample": (
        ["algorithm.adv_estimator=gae", "critic.ppo_max_token_len_per_gpu=2047"],
        "critic.ppo_max_token_len_per_gpu=2047 is less than "
        "data.max_prompt_length + data.max_response_length = 2048.",
        ["algorithm.adv_estimator=gae", "critic.ppo_max_token_len_per_gpu=2048"],
    ),
    "the_engine_holds_the_longest_sample": (
        ["rollout.max_model_len=2047"],
        "rollout.max_model_len=2047 is less than "
        "data.max_prompt_length + data.max_response_length = 2048.",
        ["rollout.max_model_len=2048"],
    ),
    "engines_divide_the_devices": (
        ["trainer.n_gpus_per_node=3", "rollout.tensor_model_parallel_size=2"],
        "rollout.tensor_model_parallel_size=2 does not divide trainer.n_gpus_per_node=3.",
        ["trainer.n_gpus_per_node=4", "rollout.tensor_model_parallel_size=2"],
    ),
    "routes_are_recorded_in_train_workers": (
        ["actor.router_replay.mode=R3", "rollout.host=process", "rollout.weight_transport=far"],
        "rollout.host='process' keeps no routes, and actor.router_replay.mode=R3 replays the "
        "engine's.",
        ["actor.router_replay.mode=R3"],
    ),
    "engines_that_generate_beside_training_are_apart": (
        ["trainer.loop=overlapped", "trainer.max_staleness=1"],
        "trainer.max_staleness=1 has engines generate while the trainer works, and "
        "rollout.host=in_process has none. Set rollout.host=process, or trainer.max_staleness=0.",
        ["trainer.loop=overlapped", "trainer.max_staleness=1", "rollout.host=process"],
    ),
    "weights_reach_the_engines": (
        ["rollout.weight_transport=far"],
        "rollout.weight_transport='far' does not reach an engine in the train worker's process. "
        "Those that do: direct, disk, gloo, shared_memory.",
        ["rollout.weight_transport=direct"],
    ),
    "validation_data_is_named_when_asked_for": (
        ["trainer.test_freq=5"],
        "trainer.test_freq=5 asks for validation without data.val_files.",
        ["trainer.test_freq=5", "trainer.val_only=true", "data.val_files=v"],
    ),
    "responses_are_generated_not_read": (
        ["data.messages_key=talk"],
        "data.messages_key='talk' is read by mcore_rl.sft alone. Remove it.",
        [],
    ),
}
NEED_NAMES = RULES.keys() - {"a_model_is_named", "training_data_is_named"}

# Rules about sections that supervised fine-tuning does not have.
NOT_OF_SFT = {
    "a_critic_is_described_only_where_there_is_one",
    "minibatches_of_the_critic_divide_a_step",
    "groups_are_filtered_by_what_is_known_by_then",
    "groups_that_are_filtered_have_several_samples",
    "prompts_are_drawn_in_other_batches_only_to_be_chosen",
    "stragglers_are_stopped_where_more_is_drawn_than_trains",
    "stragglers_are_stopped_before_they_are_scored",
    "an_adaptive_kl_coefficient_stays_positive",
    "the_overlong_buffer_fits_in_a_response",
    "groups_are_large_enough",
    "recorded_routes_are_replayed",
    "syncs_of_adapters_are_chosen_only_where_there_are_some",
    "minibatches_divide_a_step",
    "a_micro_batch_of_the_critic_holds_the_longest_sample",
    "the_engine_holds_the_longest_sample",
    "engines_divide_the_devices",
    "routes_are_recorded_in_train_workers",
    "engines_that_generate_beside_training_are_apart",
    "weights_reach_the_engines",
    "validation_data_is_named_when_asked_for",
    "responses_are_generated_not_read",
}


@pytest.fixture(autouse=True)
def far_transport(monkeypatch):
    """A transport of a plug-in between processes."""
    far = replace(TRANSPORTS.get("direct"), reaches=frozenset({Distance.SAME_MACHINE}))
    monkeypatch.setattr(TRANSPORTS, "_entries", TRANSPORTS._entries | {"far": far})


def compose(overrides, root: type[Any] = RunConfig) -> Any:
    groups = ["rollout.n=2"] if root is RunConfig else []  # the default estimator compares samples
    return compose_config(root, parse_command_line("train", "", [*groups, *overrides]))


def test_every_rule_of_the_module_is_in_the_table():
    functions = {
        name
        for name, function in inspect.getmembers(checks, inspect.isfunction)
        if function.__module__ == checks.__name__ and not name.startswith("_")
    }
    assert functions - {"check_eval", "check_run", "check_sft", "fine_tuning_only_trains"} == set(
        RULES
    )


@pytest.mark.parametrize("rule", RULES)
def test_training_refuses_what_a_rule_forbids(rule):
    breaking, expected, _ = RULES[rule]
    config = compose([*(NAMED if rule in NEED_NAMES else []), *breaking])
    for check in (getattr(checks, rule), check_run):
        with pytest.raises(UserError) as caught:
            check(config)
        assert str(caught.value).startswith(expected)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["data.val_files=v", "trainer.test_freq=5"])
def test_the_best_of_a_validation_needs_data_and_a_frequency(missing):
    best = ["trainer.max_ckpt_to_keep=1", "trainer.best_ckpt_metric=eval/math/accuracy"]
    both = ["data.val_files=v", "trainer.test_freq=5"]
    check_run(compose([*NAMED, *best, *both]))
    left = [option for option in both if option != missing]
    with pytest.raises(UserError, match=r"data\.val_files"):
        check_run(compose([*NAMED, *best, *left]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["model.lora_rank=8", f"{OVERRIDE}.moe_router_bias_update_rate=0.001"],
            "moe_router_bias_update_rate=0.001 would move routers that model.lora_rank=8 leaves",
        ),
        (
            ["actor.router_replay.mode=R3", f"{OVERRIDE}.moe_router_fusion=true"],
            "moe_router_fusion=True routes without looking at what actor.router_replay.mode=R3",
        ),
        (
            [*PP2, "trainer.dry_run=true", f"{OVERRIDE}.num_layers_in_last_pipeline_stage=2"],
            "num_layers_in_last_pipeline_stage=2 divides the layers in a way that trainer.dry_run",
        ),
    ],
)
def test_what_else_a_run_does_decides_which_overrides_are_refused(options, expected):
    *others, _ = options
    check_run(compose([*NAMED, *others]))
    with pytest.raises(UserError, match=re.escape(f"{OVERRIDE[1:]}.{expected}")):
        check_run(compose([*NAMED, *options]))


@pytest.mark.parametrize("rule", RULES)
def test_training_accepts_the_nearest_configuration_that_keeps_a_rule(rule):
    config = compose([*NAMED, *RULES[rule][2]])
    getattr(checks, rule)(config)
    check_run(config)


@pytest.mark.parametrize("rule", sorted(RULES.keys() - NOT_OF_SFT))
def test_fine_tuning_refuses_what_a_rule_forbids(rule):
    breaking, expected, keeping = RULES[rule]
    config = compose([*(NAMED if rule in NEED_NAMES else []), *breaking], SftRunConfig)
    with pytest.raises(UserError) as caught:
        check_sft(config)
    assert str(caught.value).startswith(expected)
    check_sft(compose([*NAMED, *keeping], SftRunConfig))


@pytest.mark.parametrize(
    "override",
    [
        "data.val_files=v",
        "data.val_batch_size=8",
        "data.gen_batch_size=8",
        "data.reward_fn_key=source",
        "data.val_max_samples=8",
        "data.ground_truth_key=answer",
        "trainer.val_only=true",
        "trainer.critic_warmup=3",
        "trainer.val_before_train=false",
        "trainer.test_freq=5",
        "trainer.log_val_generations=0",
    ],
)
def test_fine_tuning_refuses_what_it_would_not_read(override):
    key = re.escape(override.split("=")[0])
    with pytest.raises(UserError, match=f"^{key}=.* is not read by mcore_rl.sft, .* Remove it.$"):
        check_sft(compose([*NAMED, override], SftRunConfig))


def test_a_validation_alone_needs_validation_data():
    with pytest.raises(UserError, match=r"^trainer\.val_only=True asks for validation without"):
        check_run(compose([*NAMED, "trainer.val_only=true"]))


def test_an_evaluation_needs_model_and_validation_data_and_no_step_to_train():
    evaluation = ["trainer.val_only=true", "model.path=m"]
    check_eval(compose([*evaluation, "data.val_files=v"]))
    with pytest.raises(UserError, match=r"^trainer\.val_only=True asks for validation without"):
        check_eval(compose(evaluation))
    with pytest.raises(UserError, match=r"^model\.path=None is not set"):
        check_eval(compose(["trainer.val_only=true", "data.val_files=v"]))
    short = ["data.val_files=v", "rollout.max_model_len=8"]
    with pytest.raises(UserError, match=r"^rollout\.max_model_len=8 is less than"):
        check_eval(compose([*evaluation, *short]))
    with pytest.raises(UserError, match=r"^data\.train_files=None is not set"):
        check_run(compose([*evaluation, "data.val_files=v"]))


@pytest.mark.parametrize("section", ["actor", "critic"])
@pytest.mark.parametrize(("option", "value"), [("min_lr", "1e-07"), ("lr_decay_steps", "10")])
def test_a_constant_rate_has_no_end(section, option, value):
    with pytest.raises(UserError, match=f"{section}.optim.{option}={value}.* is not read with"):
        compose([f"{section}.optim.{option}={value}"])
    compose([f"{section}.optim.{option}={value}", f"{section}.optim.lr_decay_style=cosine"])


def test_the_token_budget_is_not_read_when_sequences_are_counted():
    config = compose(
        [*NAMED, "actor.ppo_micro_batch_size_per_gpu=2", "actor.ppo_max_token_len_per_gpu=1"]
    )
    check_run(config)


@pytest.mark.parametrize("section", ["actor", "critic"])
def test_the_ranks_that_a_row_is_cut_over_hold_the_longest_sample_together(section):
    key = f"{section}.ppo_max_token_len_per_gpu"
    overrides = [*NAMED, *CP2, "algorithm.adv_estimator=gae"]
    check_run(compose([*overrides, f"{key}=1024"]))
    with pytest.raises(UserError) as caught:
        check_run(compose([*overrides, f"{key}=1023"]))
    assert str(caught.value) == (
        f"{key}=1023 times actor.megatron.context_parallel_size=2 is less than "
        "data.max_prompt_length + data.max_response_length = 2048. Raise it to at least 1024."
    )


def test_the_ranks_that_a_row_is_cut_over_have_a_token_budget_together():
    config = compose(["actor.megatron.context_parallel_size=3", "algorithm.adv_estimator=gae"])
    expected = {"actor": config.actor.cut, "critic": config.critic.cut_over(3)}
    for section, cut in expected.items():
        key = f"{section}.ppo_max_token_len_per_gpu"
        assert cut == TokenBudget(max_tokens=3 * 16384, key=f"{key} * context_parallel_size")
    assert config.actor.cut_over(1) == TokenBudget(max_tokens=16384)
    counted = compose(
        ["actor.megatron.context_parallel_size=3", "actor.ppo_micro_batch_size_per_gpu=2"]
    )
    assert counted.actor.cut == SequenceCount(num_sequences=2)


COMPARE_SAMPLES = {
    "gpg",
    "grpo",
    "grpo_passk",
    "opo",
    "reinforce_plus_plus_baseline",
    "rloo",
}


@pytest.mark.parametrize("estimator", ADVANTAGES)
def test_estimators_that_compare_the_samples_of_a_prompt_refuse_a_lone_one(estimator):
    lone = compose([*NAMED, f"algorithm.adv_estimator={estimator}", "rollout.n=1"])
    if estimator in COMPARE_SAMPLES:
        with pytest.raises(UserError, match=r"^rollout\.n=1 is too few samples per prompt for"):
            check_run(lone)
    else:
        check_run(lone)
    check_run(compose([*NAMED, f"algorithm.adv_estimator={estimator}", "rollout.n=2"]))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_with_data_and_model_alone(name):
    line = parse_command_line("train", "", ["--config-name", name, *NAMED, "data.val_files=v"])
    config = compose_config(RunConfig, line)
    check_run(config)
    assert config.rollout.n > 1


def test_a_layout_counts_experts_over_the_whole_world():
    """Expert parallelism takes its ranks from tensor and data parallelism, not beside them."""
    megatron = compose(
        [
            "actor.megatron.tensor_model_parallel_size=2",
            "actor.megatron.pipeline_model_parallel_size=2",
            "actor.megatron.expert_model_parallel_size=4",
            "actor.megatron.expert_tensor_parallel_size=1",
        ]
    ).actor.megatron
    assert train_layout(megatron, 8) == Layout(tp=2, pp=2, ep=4, etp=1, dp=2)
    with pytest.raises(UserError, match="4 is not a multiple of expert 4 x expert tensor 1 x pipe"):
        train_layout(megatron, 4)


@pytest.mark.parametrize("of_loss", [False, True])
@pytest.mark.parametrize("of_reward", [False, True])
def test_a_reference_is_needed_for_either_kl_term(of_loss, of_reward):
    overrides = [f"actor.use_kl_loss={of_loss}", f"algorithm.use_kl_in_reward={of_reward}"]
    assert compose(overrides).needs_reference == (of_loss or of_reward)


@pytest.mark.parametrize(
    ("overrides", "environment", "is_told"),
    [
        ([], {}, False),  # on this machine
        (["trainer.launcher=ray"], {}, True),
        ([], {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, False),
        ([], {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, True),
    ],
)
def test_engines_on_machines_of_their_own_are_not_reached_by_shared_memory(
    monkeypatch, overrides, environment, is_told
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    apart = ["rollout.host=process", "rollout.nnodes=1", "rollout.n_gpus_per_node=1"]
    assert compose([*apart, *overrides]).rollout.transport == "gloo"
    cfg = compose([*apart, *overrides, "rollout.weight_transport=shared_memory"])
    if not is_told:
        checks.weights_reach_the_engines(cfg)
        return
    rule = r"rollout\.weight_transport='shared_memory' does not reach an engine on another machine"
    with pytest.raises(UserError, match=rule):
        checks.weights_reach_the_engines(cfg)
