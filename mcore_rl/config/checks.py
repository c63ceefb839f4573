"""Rules that span sections of the configuration; each is one function named after what it demands.

They run after composition, before any process is started, and change nothing.
"""

from __future__ import annotations

from mcore_rl.config.run import RunConfig, SftRunConfig, train_layout
from mcore_rl.errors import require


def check_run(cfg: RunConfig) -> None:
    """Raise a UserError for the first rule that the configuration of a training run breaks."""
    a_model_is_named(cfg)
    training_data_is_named(cfg)
    parallel_sizes_divide_the_workers(cfg)
    pipelines_are_interleaved_only_with_stages(cfg)
    minibatches_divide_a_step(cfg)
    a_micro_batch_holds_the_longest_sample(cfg)
    the_engine_holds_the_longest_sample(cfg)
    engines_hold_whole_models(cfg)
    validation_data_is_named_when_asked_for(cfg)


def check_sft(cfg: SftRunConfig) -> None:
    """Raise a UserError for the first rule that the configuration of an SFT run breaks."""
    a_model_is_named(cfg)
    training_data_is_named(cfg)
    parallel_sizes_divide_the_workers(cfg)
    pipelines_are_interleaved_only_with_stages(cfg)
    a_micro_batch_holds_the_longest_sample(cfg)


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


def minibatches_divide_a_step(cfg: RunConfig) -> None:
    size, step = cfg.actor.ppo_mini_batch_size, cfg.data.train_batch_size
    require(
        step % size == 0,
        "actor.ppo_mini_batch_size",
        size,
        f"does not divide data.train_batch_size={step}",
    )


def a_micro_batch_holds_the_longest_sample(cfg: RunConfig | SftRunConfig) -> None:
    if cfg.actor.ppo_micro_batch_size_per_gpu is not None:
        return
    longest = cfg.data.max_prompt_length + cfg.data.max_response_length
    budget = cfg.actor.ppo_max_token_len_per_gpu
    cp = cfg.actor.megatron.context_parallel_size
    require(
        budget * cp >= longest,
        "actor.ppo_max_token_len_per_gpu",
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


def engines_hold_whole_models(cfg: RunConfig) -> None:
    tp = cfg.rollout.tensor_model_parallel_size
    require(
        tp == 1,
        "rollout.tensor_model_parallel_size",
        tp,
        "is not supported yet: every train worker hosts an engine with the whole model",
        "Use 1.",
    )


def validation_data_is_named_when_asked_for(cfg: RunConfig) -> None:
    require(
        cfg.trainer.test_freq == -1 or cfg.data.val_files is not None,
        "trainer.test_freq",
        cfg.trainer.test_freq,
        "asks for validation without data.val_files",
        "Name data.val_files, or leave out trainer.test_freq.",
    )
