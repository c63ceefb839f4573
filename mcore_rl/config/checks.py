"""Rules that span sections of the configuration; each is one function named after what it demands.

They run after composition, before any process is started, and change nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from mcore_rl.algorithms.advantages.base import ADVANTAGES
from mcore_rl.config.run import (
    CriticConfig,
    MinibatchConfig,
    RunConfig,
    SftRunConfig,
    TrainerConfig,
    train_layout,
)
from mcore_rl.data.prompts import DataConfig
from mcore_rl.errors import require, user_error
from mcore_rl.megatron.overrides import Circumstances, check_overrides
from mcore_rl.weight_sync.base import TRANSPORTS, Distance


def check_run(cfg: RunConfig) -> None:
    """Raise a UserError for the first rule that the configuration of a training run breaks."""
    _check_training(cfg)
    _check_generation(cfg)
    minibatches_divide_a_step(cfg)
    a_critic_is_described_only_where_there_is_one(cfg)
    minibatches_of_the_critic_divide_a_step(cfg)
    groups_are_large_enough(cfg)
    groups_that_are_filtered_have_several_samples(cfg)
    groups_are_filtered_by_what_is_known_by_then(cfg)
    prompts_are_drawn_in_other_batches_only_to_be_chosen(cfg)
    stragglers_are_stopped_where_more_is_drawn_than_trains(cfg)
    stragglers_are_stopped_before_they_are_scored(cfg)
    the_overlong_buffer_fits_in_a_response(cfg)
    an_adaptive_kl_coefficient_stays_positive(cfg)
    recorded_routes_are_replayed(cfg)
    a_micro_batch_of_the_critic_holds_the_longest_sample(cfg)
    engines_that_generate_beside_training_are_apart(cfg)


def check_eval(cfg: RunConfig) -> None:
    """Raise a UserError for the first rule that the configuration of an evaluation breaks."""
    _check_model(cfg)
    _check_generation(cfg)


def check_sft(cfg: SftRunConfig) -> None:
    """Raise a UserError for the first rule that the configuration of an SFT run breaks."""
    _check_training(cfg)
    a_micro_batch_holds_the_longest_sample(cfg)
    fine_tuning_only_trains(cfg)


def _check_generation(cfg: RunConfig) -> None:
    syncs_of_adapters_are_chosen_only_where_there_are_some(cfg)
    a_micro_batch_holds_the_longest_sample(cfg)
    the_engine_holds_the_longest_sample(cfg)
    engines_divide_the_devices(cfg)
    weights_reach_the_engines(cfg)
    routes_are_recorded_in_train_workers(cfg)
    validation_data_is_named_when_asked_for(cfg)
    responses_are_generated_not_read(cfg)


def _check_training(cfg: RunConfig | SftRunConfig) -> None:
    _check_model(cfg)
    training_data_is_named(cfg)
    the_best_checkpoint_is_told_by_a_validation_that_happens(cfg)


def _check_model(cfg: RunConfig | SftRunConfig) -> None:
    a_model_is_named(cfg)
    parallel_sizes_divide_the_workers(cfg)
    pipelines_are_interleaved_only_with_stages(cfg)
    overrides_leave_alone_what_others_decide(cfg)
    adapters_hang_on_layers_of_their_own(cfg)


def the_best_checkpoint_is_told_by_a_validation_that_happens(cfg: RunConfig | SftRunConfig) -> None:
    metric = cfg.trainer.best_ckpt_metric
    validates = cfg.data.val_files is not None and cfg.trainer.test_freq > 0
    require(
        metric is None or not metric.startswith("eval/") or validates,
        "trainer.best_ckpt_metric",
        metric,
        "is of a validation, and there is none while checkpoints are written",
        "Set data.val_files and trainer.test_freq, or take another metric.",
    )


def a_model_is_named(cfg: RunConfig | SftRunConfig) -> None:
    require(
        cfg.model.path is not None,
        "model.path",
        None,
        "is not set",
        "Name a Hugging Face model folder.",
    )


def training_data_is_named(cfg: RunConfig | SftRunConfig) -> None:
    require(
        cfg.data.train_files is not None,
        "data.train_files",
        None,
        "is not set",
        "Name one or more Parquet or JSON files.",
    )


def parallel_sizes_divide_the_workers(cfg: RunConfig | SftRunConfig) -> None:
    train_layout(cfg.actor.megatron, cfg.trainer.world_size)


def pipelines_are_interleaved_only_with_stages(cfg: RunConfig | SftRunConfig) -> None:
    megatron = cfg.actor.megatron
    vpp = megatron.virtual_pipeline_model_parallel_size
    require(
        vpp is None or megatron.pipeline_model_parallel_size > 1,
        "actor.megatron.virtual_pipeline_model_parallel_size",
        vpp,
        "needs actor.megatron.pipeline_model_parallel_size of at least 2",
    )


def overrides_leave_alone_what_others_decide(cfg: RunConfig | SftRunConfig) -> None:
    """Which fields of Megatron's that are, and why: megatron/overrides.py."""
    replay = cfg.actor.router_replay.mode if isinstance(cfg, RunConfig) else "disabled"
    check_overrides(
        Circumstances(
            megatron=cfg.actor.megatron,
            lora_rank=cfg.model.lora_rank,
            router_replay=replay,
            is_plan=cfg.trainer.dry_run,
        )
    )


def adapters_hang_on_layers_of_their_own(cfg: RunConfig | SftRunConfig) -> None:
    """Transformer Engine's layers are fused with the norm before them, or hold all experts."""
    if cfg.model.lora is None:
        return
    impl = cfg.actor.megatron.transformer_impl
    require(
        impl != "transformer_engine",
        "actor.megatron.transformer_impl",
        impl,
        f"has no layers that model.lora_rank={cfg.model.lora_rank} could adapt",
        "Use local.",
    )


def syncs_of_adapters_are_chosen_only_where_there_are_some(cfg: RunConfig) -> None:
    how = cfg.rollout.lora_sync
    rule, fix = "is not read without model.lora_rank", "Leave it out."
    require(cfg.model.lora is not None or how == "auto", "rollout.lora_sync", how, rule, fix)


def recorded_routes_are_replayed(cfg: RunConfig) -> None:
    """Before the first update the routers choose what the pass before it recorded."""
    updates = cfg.data.train_batch_size // cfg.actor.ppo_mini_batch_size * cfg.actor.ppo_epochs
    mode = cfg.actor.router_replay.mode
    require(
        mode != "R2" or updates > 1,
        "actor.router_replay.mode",
        mode,
        "has nothing to replay in steps of one update",
        "Lower actor.ppo_mini_batch_size, raise actor.ppo_epochs, or use R3.",
    )


def minibatches_divide_a_step(cfg: RunConfig) -> None:
    size, step = cfg.actor.ppo_mini_batch_size, cfg.data.train_batch_size
    require(
        step % size == 0,
        "actor.ppo_mini_batch_size",
        size,
        f"does not divide data.train_batch_size={step}",
    )


def a_critic_is_described_only_where_there_is_one(cfg: RunConfig) -> None:
    if not cfg.has_critic:
        estimator = cfg.algorithm.adv_estimator
        rule = f"is not read with algorithm.adv_estimator={estimator}, which needs no critic"
        for key, value in _differences(cfg.critic, CriticConfig(), "critic"):
            raise user_error(key, value, rule, "Remove it.")
        warmup = cfg.trainer.critic_warmup
        require(warmup == 0, "trainer.critic_warmup", warmup, rule, "Remove it.")


def _differences(section: Any, other: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of each option in which a section differs from another."""
    for name in (field.name for field in fields(section)):
        value, unlike = getattr(section, name), getattr(other, name)
        if is_dataclass(value):
            yield from _differences(value, unlike, f"{key}.{name}")
        elif value != unlike:
            yield f"{key}.{name}", value


def minibatches_of_the_critic_divide_a_step(cfg: RunConfig) -> None:
    size, step = cfg.critic.ppo_mini_batch_size, cfg.data.train_batch_size
    rule = f"does not divide data.train_batch_size={step}"
    require(size is None or step % size == 0, "critic.ppo_mini_batch_size", size, rule)


def groups_are_large_enough(cfg: RunConfig) -> None:
    estimator, n = cfg.algorithm.adv_estimator, cfg.rollout.n
    fewest = ADVANTAGES.get(estimator).min_group_size
    rule = f"is too few samples per prompt for algorithm.adv_estimator={estimator}"
    require(n >= fewest, "rollout.n", n, rule, f"Raise it to at least {fewest}.")


def groups_that_are_filtered_have_several_samples(cfg: RunConfig) -> None:
    rule = "leaves algorithm.filter_groups nothing to compare"
    compares = cfg.rollout.n > 1 or not cfg.algorithm.filter_groups.enable
    require(compares, "rollout.n", cfg.rollout.n, rule, "Raise it to at least 2.")


def groups_are_filtered_by_what_is_known_by_then(cfg: RunConfig) -> None:
    metric = cfg.algorithm.filter_groups.metric
    require(
        metric != "seq_final_reward" or not cfg.algorithm.use_kl_in_reward,
        "algorithm.filter_groups.metric",
        metric,
        "is not known while groups are collected: algorithm.use_kl_in_reward=true takes the KL off "
        "later",
        "Use seq_reward.",
    )


def prompts_are_drawn_in_other_batches_only_to_be_chosen(cfg: RunConfig) -> None:
    size, stops = cfg.data.gen_batch_size, cfg.rollout.stop_stragglers
    rule = "is not read without algorithm.filter_groups.enable or rollout.stop_stragglers"
    reads = size is None or stops or cfg.algorithm.filter_groups.enable
    require(reads, "data.gen_batch_size", size, rule, "Remove it.")


def stragglers_are_stopped_where_more_is_drawn_than_trains(cfg: RunConfig) -> None:
    size, trained = cfg.data.gen_batch_size, cfg.data.train_batch_size
    fits = not cfg.rollout.stop_stragglers or (size is not None and size > trained)
    rule = "leaves no group that rollout.stop_stragglers could stop"
    fix = f"Set it above data.train_batch_size={trained}."
    require(fits, "data.gen_batch_size", size, rule, fix)


def stragglers_are_stopped_before_they_are_scored(cfg: RunConfig) -> None:
    stops, filtering = cfg.rollout.stop_stragglers, cfg.algorithm.filter_groups.enable
    rule = (
        "stops groups when enough have ended, and with algorithm.filter_groups.enable=true how "
        "many are enough shows when they are scored"
    )
    require(not (stops and filtering), "rollout.stop_stragglers", stops, rule, "Set one of them.")


def the_overlong_buffer_fits_in_a_response(cfg: RunConfig) -> None:
    buffer, longest = cfg.reward.overlong_buffer, cfg.data.max_response_length
    rule = f"is more than data.max_response_length={longest}"
    require(buffer.len <= longest, "reward.overlong_buffer.len", buffer.len, rule, "Lower it.")


def an_adaptive_kl_coefficient_stays_positive(cfg: RunConfig) -> None:
    ctrl, samples = cfg.algorithm.kl_ctrl, cfg.data.train_batch_size * cfg.rollout.n
    if cfg.algorithm.use_kl_in_reward and ctrl.type == "adaptive":
        least = ctrl.min_horizon(samples)
        rule = f"would let one step of {samples} samples turn the coefficient to 0 or below"
        fix = f"Raise it to at least {least}."
        require(ctrl.horizon >= least, "algorithm.kl_ctrl.horizon", ctrl.horizon, rule, fix)


def engines_that_generate_beside_training_are_apart(cfg: RunConfig) -> None:
    """An engine inside a train worker has no requests left when it has answered."""
    age, rollout = cfg.trainer.max_staleness, cfg.rollout
    key, rule = "trainer.max_staleness", "has engines generate while the trainer works, and "
    fix = "Set rollout.host=process, or trainer.max_staleness=0."
    is_apart = rollout.host != "in_process"
    require(age == 0 or is_apart, key, age, f"{rule}rollout.host={rollout.host} has none", fix)


def a_micro_batch_holds_the_longest_sample(cfg: RunConfig | SftRunConfig) -> None:
    _require_room_for_the_longest_sample(cfg, cfg.actor)


def a_micro_batch_of_the_critic_holds_the_longest_sample(cfg: RunConfig) -> None:
    if cfg.has_critic:
        _require_room_for_the_longest_sample(cfg, cfg.critic)


def _require_room_for_the_longest_sample(
    cfg: RunConfig | SftRunConfig, trained: MinibatchConfig
) -> None:
    if trained.ppo_micro_batch_size_per_gpu is not None:
        return
    longest = cfg.data.max_prompt_length + cfg.data.max_response_length
    budget = trained.ppo_max_token_len_per_gpu
    cp = cfg.actor.megatron.context_parallel_size
    require(
        budget * cp >= longest,
        f"{trained.SECTION}.ppo_max_token_len_per_gpu",
        budget,
        (f"times actor.megatron.context_parallel_size={cp} " if cp > 1 else "")
        + f"is less than data.max_prompt_length + data.max_response_length = {longest}",
        f"Raise it to at least {-(-longest // cp)}.",
    )


def the_engine_holds_the_longest_sample(cfg: RunConfig) -> None:
    longest = cfg.data.max_prompt_length + cfg.data.max_response_length
    limit = cfg.rollout.max_model_len
    require(
        limit is None or limit >= longest,
        "rollout.max_model_len",
        limit,
        f"is less than data.max_prompt_length + data.max_response_length = {longest}",
        "Leave it out.",
    )


def engines_divide_the_devices(cfg: RunConfig) -> None:
    """An engine's devices lie side by side on one node; a server has its own."""
    if cfg.rollout.host == "server":
        return
    tp, key, per_node = (
        cfg.rollout.tensor_model_parallel_size,
        "trainer.n_gpus_per_node",
        cfg.trainer.n_gpus_per_node,
    )
    if cfg.rollout.n_gpus_per_node is not None:
        key, per_node = "rollout.n_gpus_per_node", cfg.rollout.n_gpus_per_node
    require(
        per_node % tp == 0,
        "rollout.tensor_model_parallel_size",
        tp,
        f"does not divide {key}={per_node}",
    )


def weights_reach_the_engines(cfg: RunConfig) -> None:
    """Where engines are, rollout.host says, and with nodes of their own the launcher."""
    name, there = cfg.rollout.transport, cfg.rollout.distance
    if cfg.rollout.nnodes and _starts_on_several_machines(cfg):
        there = Distance.OTHER_MACHINE
    is_server = cfg.rollout.host == "server"
    others = [
        other
        for other in TRANSPORTS
        if there in TRANSPORTS.get(other).reaches
        and (TRANSPORTS.get(other).update or not is_server)
    ]
    require(
        name in others,
        "rollout.weight_transport",
        name,
        f"does not reach an engine {there.value}",
        f"Those that do: {', '.join(others)}.",
    )


def _starts_on_several_machines(cfg: RunConfig) -> bool:
    """Ray may put nodes on different ones; torchrun says it to its processes."""
    launched, here = os.environ.get("WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
    return cfg.trainer.launcher == "ray" or ("RANK" in os.environ and launched != here)


def routes_are_recorded_in_train_workers(cfg: RunConfig) -> None:
    """Those of an engine elsewhere have no road to the ranks that replay them."""
    host = cfg.rollout.host
    require(
        cfg.actor.router_replay.mode != "R3" or host == "in_process",
        "rollout.host",
        host,
        "keeps no routes, and actor.router_replay.mode=R3 replays the engine's",
        "Use in_process, or actor.router_replay.mode=R2.",
    )


def validation_data_is_named_when_asked_for(cfg: RunConfig) -> None:
    require(
        cfg.trainer.test_freq == -1 or cfg.data.val_files is not None,
        "trainer.test_freq",
        cfg.trainer.test_freq,
        "asks for validation without data.val_files",
        "Name data.val_files, or leave out trainer.test_freq.",
    )
    require(
        not cfg.trainer.val_only or cfg.data.val_files is not None,
        "trainer.val_only",
        True,
        "asks for validation without data.val_files",
        "Name data.val_files.",
    )


def responses_are_generated_not_read(cfg: RunConfig) -> None:
    rule = "is read by mcore_rl.sft alone"
    for key, value in _differences(cfg.data, DataConfig(), "data"):
        reads = key not in ("data.response_key", "data.messages_key")
        require(reads, key, value, rule, "Remove it.")


_UNREAD_BY_FINE_TUNING = {
    "data.val_files",
    "data.val_batch_size",
    "data.val_max_samples",
    "data.ground_truth_key",
    "data.gen_batch_size",
    "data.reward_fn_key",
    "trainer.critic_warmup",
    "trainer.val_before_train",
    "trainer.val_only",
    "trainer.test_freq",
    "trainer.journal",
    "trainer.log_val_generations",
}


def fine_tuning_only_trains(cfg: SftRunConfig) -> None:
    rule = "is not read by mcore_rl.sft, which draws no samples, scores none and does not validate"
    for key, value in (
        *_differences(cfg.data, DataConfig(), "data"),
        *_differences(cfg.trainer, TrainerConfig(), "trainer"),
    ):
        require(key not in _UNREAD_BY_FINE_TUNING, key, value, rule, "Remove it.")
