"""What the options of a verl command line are here: a table, a row for each key.

Keys stand without the prefix `actor_rollout_ref.`; one that ends in `.*` stands for all below it
that have no row of their own. An option that bears its own name here is in no row. What an option
asks for is either what happens anyway, or set by other keys, or named in one warning if no number
depends on it, or refused: a run never computes something else than its command line says.
Misspelt keys are in no row and stay errors. `assignments.py` applies the rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

VERL_BASES = ("ppo_trainer", "ppo_megatron_trainer", "dapo_trainer", "dapo_megatron_trainer")
"""verl's `--config-name`: its defaults, in whose place stand those of this package."""

WILDCARD = ".*"


@dataclass(frozen=True, slots=True)
class Renamed:
    """The value goes to another key."""

    key: str
    """verl's, as in all rows."""
    to: str


@dataclass(frozen=True, slots=True)
class Unread:
    """Is named in the warning, unless its value stands in `values`: no number depends on it."""

    key: str
    reason: str
    values: Mapping[Hashable, str] = field(default_factory=dict[Hashable, str])
    """Accepted in silence, with what they are here: key=value pairs, "" for what happens anyway."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Is an error, unless its value stands in `values`: numbers or the model depend on it."""

    key: str
    fix: str
    values: Mapping[Hashable, str] = field(default_factory=dict[Hashable, str])
    """As in `Unread`."""


Row = Renamed | Unread | Refused

# Values that ask for what happens anyway.
_OFF: Mapping[Hashable, str] = {False: "", None: ""}
_ON: Mapping[Hashable, str] = {True: ""}
_UNSET: Mapping[Hashable, str] = {None: ""}

_RECOMPUTE = " ".join(
    f"actor.megatron.override_transformer_config.recompute_{option}"
    for option in ("granularity=full", "method=uniform", "num_layers=1")
)

_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "sequence_parallel",
    "use_mbridge",
    "vanilla_mbridge",
    "seed",
)
"""Options that verl has for the reference and the critic too."""

_OFFLOAD_ALL: Mapping[Hashable, str] = {
    True: " ".join(
        f"actor.megatron.{part}_offload=true" for part in ("param", "grad", "optimizer")
    ),
    False: "",
    None: "",
}

# Reasons and fixes of several rows.
_ADAM = "The optimizer is AdamW with float32 masters and moments: actor.optim."
_CONFIG_JSON = "Change config.json in model.path."
_CORRECTION = "Set algorithm.rollout_correction."
_CRITIC_MEGATRON = "A critic has the layout and options of actor.megatron."
_IN_ORDER = "The minibatches of a step keep the order of its prompts."
_LOGGED = "the penalty is always logged"
_LOGPROBS = "log-probabilities are computed in the micro-batches of training"
_ON_DEVICE = "an update is computed on the device: actor.megatron.optimizer_offload"
_NO_DROPOUT = "No pass has dropout."
_NO_RAY = "where processes run follows from trainer.launcher and RAY_ADDRESS"
_NO_REWARD_MODEL = "there is no reward model"
_PACKED = "rows are always packed"
_PROFILER = "there is no profiler"
_REFERENCE = "the reference is laid out as the actor"
_REWARD_FUNCTION = "Set custom_reward_function.path to a function of one response or of a batch."
_SHARDS = "Megatron shards by actor.megatron"
_SPEED = "changes speed or memory alone"
_SUMMED = "Gradients are summed over ranks, and the loss has every denominator."
_SYNC = "weights reach the engine within its process"
_TEXT_ALONE = "text alone is read"
_VALUES = "values are computed in the micro-batches of training"
_WHOLE_MODEL = "Every engine holds a whole model."

_ACTOR = (
    Unread("actor.strategy", "actors are Megatron's", {"megatron": ""}),
    Unread("model_engine", "actors are Megatron's", {"megatron": ""}),
    Refused(
        "actor.use_gpg_loss",
        "Set actor.policy_loss.loss_mode.",
        {True: "actor.policy_loss.loss_mode=gpg", False: ""},
    ),
    Refused(
        "actor.use_token_level_loss",
        "Set actor.loss_agg_mode.",
        {True: "actor.loss_agg_mode=token-mean", False: "actor.loss_agg_mode=seq-mean-token-mean"},
    ),
    Refused("actor.ppo_micro_batch_size", "Set actor.ppo_micro_batch_size_per_gpu.", _UNSET),
    Refused("actor.shuffle", _IN_ORDER, _OFF),
    Unread("actor.data_loader_seed", "the minibatches of a step keep the order of its prompts"),
    Refused(
        "actor.tis_imp_ratio_cap",
        "Set algorithm.rollout_correction.rollout_is=token and .rollout_is_threshold.",
        {-1: "", None: ""},
    ),
    Refused("actor.load_weight", "Training starts from the weights in model.path.", _ON),
    Renamed("actor.checkpoint.async_save", "trainer.async_save"),
    Refused("actor.checkpoint.load_contents", "A checkpoint is resumed whole."),
    Unread("actor.checkpoint.save_contents", "a checkpoint is whole, trainer.export_hf_model"),
    Renamed("actor.ulysses_sequence_parallel_size", "actor.megatron.context_parallel_size"),
    Renamed(
        "actor.fsdp_config.ulysses_sequence_parallel_size", "actor.megatron.context_parallel_size"
    ),
    Renamed("actor.fsdp_config.dtype", "actor.megatron.dtype"),
    Refused(
        "actor.fsdp_config.model_dtype",
        "The optimizer's weights are float32.",
        {"fp32": "", "float32": ""},
    ),
    Renamed("actor.fsdp_config.param_offload", "actor.megatron.param_offload"),
    Renamed("actor.fsdp_config.optimizer_offload", "actor.megatron.optimizer_offload"),
    Refused("actor.fsdp_config.offload_policy", "It is true or false.", _OFFLOAD_ALL),
    Unread("actor.fsdp_config.fsdp_size", _SHARDS),
    Unread("actor.fsdp_config.forward_prefetch", _SHARDS),
    Unread("actor.fsdp_config.reshard_after_forward", _SHARDS),
    Unread("actor.fsdp_config.wrap_policy.*", _SHARDS),
    Unread("actor.entropy_checkpointing", _SPEED),
    Unread("actor.entropy_from_logits_with_chunking", _SPEED),
    Unread("actor.use_fused_kernels", _SPEED),
    Unread("actor.use_torch_compile", _SPEED),
    Unread("actor.fsdp_config.use_torch_compile", _SPEED),
    Unread("actor.use_remove_padding", _PACKED, _ON),
    Unread("actor.profiler.*", _PROFILER),
)

_ACTOR_MEGATRON = (
    Unread("actor.megatron.override_ddp_config.overlap_param_gather", _SPEED),
    Renamed("actor.megatron.router_replay.mode", "actor.router_replay.mode"),
    Renamed(
        "actor.megatron.override_ddp_config.overlap_grad_reduce",
        "actor.megatron.overlap_grad_reduce",
    ),
    Refused(
        "actor.megatron.override_ddp_config.grad_reduce_in_fp32",
        "Gradients are reduced in float32.",
        _ON,
    ),
    Renamed(
        "actor.megatron.override_ddp_config.use_distributed_optimizer",
        "actor.megatron.use_distributed_optimizer",
    ),
    Refused("actor.megatron.override_ddp_config.average_in_collective", _SUMMED, _OFF),
    Refused(
        "actor.megatron.override_ddp_config.data_parallel_sharding_strategy",
        "Set actor.megatron.use_distributed_optimizer.",
        {"no_shard": ""},
    ),
    Unread("actor.megatron.override_ddp_config.bucket_size", _SPEED),
    Unread("actor.megatron.override_ddp_config.align_param_gather", _SPEED),
    Unread(
        "actor.megatron.override_ddp_config.check_for_nan_in_grad",
        "an update with a norm that is not finite is left out",
    ),
    Refused("actor.megatron.override_mcore_model_config.*", _CONFIG_JSON),
    Refused("actor.megatron.use_dist_checkpointing", "Set model.path to the model's folder.", _OFF),
    Refused(
        "actor.megatron.dist_checkpointing_path", "Set model.path to the model's folder.", _UNSET
    ),
    Unread("actor.megatron.use_mbridge", "weights are converted by mcore_rl.models"),
    Unread("actor.megatron.vanilla_mbridge", "weights are converted by mcore_rl.models"),
)

_ACTOR_OPTIM = (
    Unread("actor.optim.override_optimizer_config.optimizer_cpu_offload", _ON_DEVICE, _OFF),
    Unread("actor.optim.override_optimizer_config.optimizer_offload_fraction", _ON_DEVICE, _OFF),
    Unread("actor.optim.override_optimizer_config.overlap_cpu_optimizer_d2h_h2d", _ON_DEVICE, _OFF),
    Refused("actor.optim.override_optimizer_config.*", _ADAM),
    Renamed("actor.optim.clip_grad", "actor.grad_clip"),
    Renamed("actor.optim.warmup_style", "actor.optim.lr_decay_style"),
    Renamed("actor.optim.lr_scheduler_type", "actor.optim.lr_decay_style"),
    Refused(
        "actor.optim.optimizer", "The optimizer is AdamW.", {"adam": "", "adamw": "", "AdamW": ""}
    ),
    Refused("actor.optim.lr_warmup_init", "The learning rate rises from 0.", {0: ""}),
    Refused(
        "actor.optim.lr_warmup_steps_ratio", "Set actor.optim.lr_warmup_steps.", {0: "", None: ""}
    ),
    Refused(
        "actor.optim.total_training_steps", "Set actor.optim.lr_decay_steps.", {-1: "", None: ""}
    ),
    Refused("actor.optim.min_lr_ratio", "Set actor.optim.min_lr.", {0: "", None: ""}),
    Refused("actor.optim.num_cycles", "A cosine falls once.", {0.5: "", None: ""}),
    Refused(
        "actor.optim.weight_decay_incr_style", "The weight decay is constant.", {"constant": ""}
    ),
    Refused(
        "actor.optim.use_checkpoint_opt_param_scheduler",
        "A resumed run takes its schedule from the command line.",
        _OFF,
    ),
)

_REF = (
    Renamed("ref.fsdp_config.param_offload", "ref.megatron.param_offload"),
    Unread("ref.strategy", "the reference is Megatron's", {"megatron": ""}),
    Refused("ref.model", "The reference is the model in model.path.", _UNSET),
    Refused("ref.model.path", "The reference is the model in model.path.", _UNSET),
    Unread("ref.ulysses_sequence_parallel_size", _REFERENCE),
    Unread("ref.fsdp_config.fsdp_size", _REFERENCE),
    Unread("ref.fsdp_config.forward_prefetch", _REFERENCE),
    Unread("ref.fsdp_config.reshard_after_forward", _REFERENCE),
    Unread("ref.fsdp_config.wrap_policy.*", _REFERENCE),
    *(Unread(f"ref.megatron.{name}", _REFERENCE) for name in _LAYOUT),
    Unread("ref.entropy_checkpointing", _SPEED),
    Unread("ref.entropy_from_logits_with_chunking", _SPEED),
    Unread("ref.use_torch_compile", _SPEED),
    Unread("ref.log_prob_micro_batch_size", _LOGPROBS),
    Unread("ref.log_prob_micro_batch_size_per_gpu", _LOGPROBS),
    Unread("ref.log_prob_use_dynamic_bsz", _LOGPROBS),
    Unread("ref.log_prob_max_token_len_per_gpu", _LOGPROBS),
    Unread("ref.profiler.*", _PROFILER),
)

_MODEL = (
    Unread("model.enable_activation_offload", "activations stay on their device", _OFF),
    Unread("model.use_remove_padding", _PACKED, _ON),
    Refused(
        "model.enable_gradient_checkpointing", "It is true or false.", {True: _RECOMPUTE, False: ""}
    ),
    Refused(
        "model.gradient_checkpointing_kwargs.*",
        "Set recompute_granularity and the like in actor.megatron.override_transformer_config.",
    ),
    Renamed("model.lora.rank", "model.lora_rank"),
    Renamed("model.lora.alpha", "model.lora_alpha"),
    Refused("model.lora_adapter_path", "Training starts from new adapters.", _UNSET),
    Refused("model.exclude_modules", "Name the layers in model.target_modules.", _UNSET),
    Refused("model.custom_chat_template", "Put it into the tokenizer's folder.", _UNSET),
    Refused("model.external_lib", "Name the module in MCORE_RL_PLUGINS.", _UNSET),
    Refused("model.tokenizer_path", "The tokenizer is that in model.path.", _UNSET),
    Unread("model.override_config.attn_implementation", "attention is Megatron's"),
    Renamed(
        "model.override_config.moe_config.freeze_moe_router", "actor.megatron.moe_router_freeze"
    ),
    Refused("model.override_config.attention_dropout", _NO_DROPOUT, {0: ""}),
    Refused("model.override_config.embd_pdrop", _NO_DROPOUT, {0: ""}),
    Refused("model.override_config.resid_pdrop", _NO_DROPOUT, {0: ""}),
    Refused("model.override_config.*", _CONFIG_JSON),
    Unread("model.trust_remote_code", "no code of a model's folder is run", _OFF),
    Unread("model.fused_kernel_options.*", _SPEED),
    Unread("model.use_fused_kernels", _SPEED),
    Unread("model.use_liger", _SPEED),
    Unread("model.use_shm", _SPEED),
)

_DATA = (
    Refused("data.tokenizer", "The tokenizer is that in model.path.", _UNSET),
    Refused("data.custom_cls.*", "Write the rows in one of the forms that are read.", _UNSET),
    Refused("data.sampler.*", "The order is that of data.shuffle and data.seed.", _UNSET),
    Refused("data.datagen.*", "Write the rows in one of the forms that are read.", _UNSET),
    Renamed("data.multiturn.messages_key", "data.messages_key"),
    Unread("data.multiturn.enable", "rows without a response are conversations", _ON),
    Unread("data.validation_shuffle", "the order of validation changes nothing", _OFF),
    Unread("data.trust_remote_code", "no code of a data set is run", _OFF),
    Unread("data.image_key", _TEXT_ALONE),
    Unread("data.video_key", _TEXT_ALONE),
    Unread("data.return_full_prompt", _TEXT_ALONE),
    Unread("data.return_multi_modal_inputs", _TEXT_ALONE),
    Unread("data.return_raw_chat", _TEXT_ALONE),
    Unread("data.return_raw_input_ids", _TEXT_ALONE),
    Unread("data.dataloader_num_workers", _SPEED),
    Unread("data.filter_overlong_prompts_workers", _SPEED),
    Unread("data.use_shm", _SPEED),
)

_ROLLOUT = (
    Unread("rollout.log_prob_micro_batch_size", _LOGPROBS),
    Unread("rollout.log_prob_micro_batch_size_per_gpu", _LOGPROBS),
    Unread("rollout.log_prob_use_dynamic_bsz", _LOGPROBS),
    Unread("rollout.log_prob_max_token_len_per_gpu", _LOGPROBS),
    Unread("rollout.mode", "engines answer a batch at a time", {"sync": ""}),
    Renamed("rollout.prompt_length", "data.max_prompt_length"),
    Renamed("rollout.response_length", "data.max_response_length"),
    Refused("rollout.do_sample", "A greedy rollout carries no policy gradient.", _ON),
    Refused("rollout.ignore_eos", "A response ends with its end token.", _OFF),
    Unread("rollout.calculate_log_probs", "they are always returned", _ON),
    Refused(
        "rollout.enable_rollout_routing_replay",
        "Set actor.router_replay.mode.",
        {True: "actor.router_replay.mode=R3", False: ""},
    ),
    Renamed("rollout.enable_prefix_caching", "rollout.engine_kwargs.enable_prefix_caching"),
    Renamed("rollout.engine_kwargs.vllm.*", "rollout.engine_kwargs.*"),
    Unread("rollout.engine_kwargs.sglang.*", "the engine is vLLM"),
    Unread("rollout.engine_kwargs.trtllm.*", "the engine is vLLM"),
    Refused("rollout.data_parallel_size", _WHOLE_MODEL, {1: ""}),
    Refused("rollout.expert_parallel_size", _WHOLE_MODEL, {1: ""}),
    Refused("rollout.pipeline_model_parallel_size", _WHOLE_MODEL, {1: ""}),
    Refused("rollout.quantization", "The engine holds the trainer's weights.", _UNSET),
    Refused("rollout.repetition_penalty", "Samples are those of the policy.", {1: ""}),
    Refused(
        "rollout.over_sample_rate",
        "Set data.gen_batch_size and rollout.stop_stragglers, which stop whole groups.",
        {0: ""},
    ),
    Refused("rollout.skip_rollout", "Every step generates.", _OFF),
    Refused("rollout.multi_turn.enable", "A response is one turn.", _OFF),
    Unread("rollout.multi_turn.*", "a response is one turn", _UNSET),
    Unread("rollout.agent.num_workers", "a response is one turn"),
    Refused(
        "rollout.agent.default_agent_loop", "A response is one turn.", {"single_turn_agent": ""}
    ),
    Unread("rollout.checkpoint_engine.*", _SYNC),
    Unread("rollout.layered_summon", _SYNC),
    Unread("rollout.load_format", _SYNC),
    Unread("rollout.nccl_timeout", _SYNC),
    Renamed("rollout.update_weights_bucket_megabytes", "rollout.update_weights_bucket_mib"),
    Unread("nccl_timeout", _SYNC),
    Unread("rollout.cudagraph_capture_sizes", _SPEED),
    Unread("rollout.disable_log_stats", _SPEED),
    Unread("rollout.enable_sleep_mode", _SPEED),
    Unread("rollout.free_cache_engine", _SPEED),
    Unread("rollout.multi_stage_wake_up", _SPEED),
    Unread("rollout.scheduling_policy", _SPEED),
    Refused("hybrid_engine", "Actor and engine share their devices.", _ON),
    Unread("rollout.profiler.*", _PROFILER),
    Unread("rollout.trace.*", _PROFILER),
)

_ALGORITHM = (
    Refused("algorithm.use_pf_ppo", "There is no preference feedback.", _OFF),
    Unread("algorithm.pf_ppo.*", "there is no preference feedback", _UNSET),
    Refused(
        "algorithm.rollout_correction.bypass_mode",
        "The trainer computes the old log-probabilities.",
        _OFF,
    ),
    Refused(
        "algorithm.rollout_correction.rollout_is_batch_normalize",
        "Weights are not normalised.",
        _OFF,
    ),
    Refused(
        "algorithm.rollout_correction.rollout_token_veto_threshold",
        "Set algorithm.rollout_correction.rollout_rs=token.",
        _UNSET,
    ),
    Refused("algorithm.rollout_is", _CORRECTION, _OFF),
    Refused("algorithm.rollout_is_level", _CORRECTION, _OFF),
    Refused("algorithm.rollout_is_mode", _CORRECTION, _OFF),
    Refused("algorithm.rollout_is_threshold", _CORRECTION, _OFF),
    Refused("algorithm.rollout_is_threshold_lower", _CORRECTION, _OFF),
    Refused("algorithm.rollout_is_veto_threshold", _CORRECTION, _OFF),
)

_REWARD = (
    Refused(
        "reward_model.reward_manager",
        _REWARD_FUNCTION,
        {"naive": "", "dapo": "", "prime": "", "batch": ""},
    ),
    Refused(
        "reward.reward_manager.name",
        _REWARD_FUNCTION,
        {"naive": "", "dapo": "", "prime": "", "batch": ""},
    ),
    Renamed("custom_reward_function.overlong_buffer.enable", "reward.overlong_buffer.enable"),
    Renamed("custom_reward_function.overlong_buffer.len", "reward.overlong_buffer.len"),
    Renamed(
        "custom_reward_function.overlong_buffer.penalty_factor",
        "reward.overlong_buffer.penalty_factor",
    ),
    Unread("custom_reward_function.overlong_buffer.log", _LOGGED, _ON),
    Renamed("reward_model.overlong_buffer.enable", "reward.overlong_buffer.enable"),
    Renamed("reward_model.overlong_buffer.len", "reward.overlong_buffer.len"),
    Renamed("reward_model.overlong_buffer.penalty_factor", "reward.overlong_buffer.penalty_factor"),
    Unread("reward_model.overlong_buffer.log", _LOGGED, _ON),
    Renamed(
        "reward_model.reward_kwargs.overlong_buffer_cfg.enable", "reward.overlong_buffer.enable"
    ),
    Renamed("reward_model.reward_kwargs.overlong_buffer_cfg.len", "reward.overlong_buffer.len"),
    Renamed(
        "reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor",
        "reward.overlong_buffer.penalty_factor",
    ),
    Unread("reward_model.reward_kwargs.overlong_buffer_cfg.log", _LOGGED, _ON),
    Renamed("reward.reward_kwargs.overlong_buffer_cfg.enable", "reward.overlong_buffer.enable"),
    Renamed("reward.reward_kwargs.overlong_buffer_cfg.len", "reward.overlong_buffer.len"),
    Renamed(
        "reward.reward_kwargs.overlong_buffer_cfg.penalty_factor",
        "reward.overlong_buffer.penalty_factor",
    ),
    Unread("reward.reward_kwargs.overlong_buffer_cfg.log", _LOGGED, _ON),
    Renamed("reward_model.reward_kwargs.max_resp_len", "data.max_response_length"),
    Renamed("reward.reward_kwargs.max_resp_len", "data.max_response_length"),
    Renamed("reward.custom_reward_function.*", "custom_reward_function.*"),
    Renamed("reward_model.num_workers", "reward.num_workers"),
    Refused("reward_model.enable", "Score by functions: custom_reward_function.path.", _OFF),
    Refused("reward_model.sandbox_fusion.url", "Programs run in reward.sandbox.", _UNSET),
    Unread("reward_model.launch_reward_fn_async", _SPEED, _OFF),
    Unread("reward_model.enable_resource_pool", _NO_REWARD_MODEL),
    Unread("reward_model.forward_max_token_len_per_gpu", _NO_REWARD_MODEL),
    Unread("reward_model.max_length", _NO_REWARD_MODEL),
    Unread("reward_model.micro_batch_size", _NO_REWARD_MODEL),
    Unread("reward_model.micro_batch_size_per_gpu", _NO_REWARD_MODEL),
    Unread("reward_model.model.*", _NO_REWARD_MODEL),
    Unread("reward_model.strategy", _NO_REWARD_MODEL),
    Unread("reward_model.use_dynamic_bsz", _NO_REWARD_MODEL),
)

_CRITIC = (
    Unread("critic.strategy", "actors and critics are Megatron's", {"megatron": ""}),
    *(Refused(f"critic.megatron.{name}", _CRITIC_MEGATRON) for name in _LAYOUT),
    Refused("critic.megatron.override_transformer_config.*", _CRITIC_MEGATRON),
    Refused("critic.megatron.override_ddp_config.*", _CRITIC_MEGATRON),
    Refused("critic.megatron.dtype", _CRITIC_MEGATRON),
    Refused("critic.megatron.use_distributed_optimizer", _CRITIC_MEGATRON),
    Refused("critic.megatron.use_dist_checkpointing", _CRITIC_MEGATRON),
    Refused("critic.megatron.dist_checkpointing_path", _CRITIC_MEGATRON),
    Refused(
        "critic.ulysses_sequence_parallel_size",
        "A critic has the layout of actor.megatron.",
        {1: ""},
    ),
    Refused("critic.ppo_micro_batch_size", "Set critic.ppo_micro_batch_size_per_gpu.", _UNSET),
    Refused("critic.shuffle", _IN_ORDER, _OFF),
    Refused("critic.model.tokenizer_path", "A critic reads the tokens of the actor.", _UNSET),
    Unread("critic.model.use_remove_padding", _PACKED, _ON),
    Unread(
        "critic.model.enable_gradient_checkpointing",
        "a critic recomputes what the actor does",
        _OFF,
    ),
    Unread("critic.forward_micro_batch_size", _VALUES),
    Unread("critic.forward_micro_batch_size_per_gpu", _VALUES),
    Unread("critic.forward_max_token_len_per_gpu", _VALUES),
    Renamed("critic.model.fsdp_config.param_offload", "critic.megatron.param_offload"),
    Renamed("critic.model.fsdp_config.optimizer_offload", "critic.megatron.optimizer_offload"),
)

_TRAINER = (
    Unread("trainer.balance_batch", "devices are always balanced", _ON),
    Renamed("trainer.max_actor_ckpt_to_keep", "trainer.max_ckpt_to_keep"),
    Unread("trainer.max_critic_ckpt_to_keep", "trainer.max_ckpt_to_keep decides", _UNSET),
    Unread("trainer.rollout_data_dir", "samples.jsonl in the run folder has samples", _UNSET),
    Unread("trainer.validation_data_dir", "samples.jsonl in the run folder has samples", _UNSET),
    Unread("trainer.default_hdfs_dir", "everything is in the run folder", _UNSET),
    Unread("trainer.del_local_ckpt_after_load", "checkpoints are kept", _OFF),
    Unread("trainer.device", "CUDA is used where it is", _UNSET),
    Unread("trainer.esi_redundant_time", "a run goes on from its last checkpoint", {0: ""}),
    Unread("ray_init.*", _NO_RAY),
    Unread("ray_kwargs.*", _NO_RAY),
    Unread("trainer.ray_wait_register_center_timeout", _NO_RAY),
    Unread("trainer.use_legacy_worker_impl", _NO_RAY),
    Unread("transfer_queue.*", _NO_RAY),
    Unread("global_profiler.*", _PROFILER),
    Unread("trainer.profile_steps", _PROFILER),
    Unread("hydra.*", "the run folder is trainer.default_local_dir"),
)

SECTIONS: dict[str, tuple[Row, ...]] = {
    "actor": _ACTOR,
    "actor.megatron": _ACTOR_MEGATRON,
    "actor.optim": _ACTOR_OPTIM,
    "ref": _REF,
    "model": _MODEL,
    "data": _DATA,
    "rollout": _ROLLOUT,
    "algorithm": _ALGORITHM,
    "reward": _REWARD,
    "critic": _CRITIC,
    "trainer": _TRAINER,
}
"""Rows by the section of the options."""

TABLE: dict[str, Row] = {row.key: row for rows in SECTIONS.values() for row in rows}
