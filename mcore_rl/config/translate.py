"""What the options of a verl command line are here: one table, which `assignments.py` applies.

Keys stand without the prefix `actor_rollout_ref.`; one that ends in `.*` stands for all below it.
An option that bears its own name here is not in the table. What an option asks for is either what
happens anyway, or set by other keys, or named in one warning if no number depends on it, or
refused: a run never computes something else than its command line says. Misspelt keys are in no
row and stay errors.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

VERL_BASES = ("ppo_trainer", "ppo_megatron_trainer", "dapo_trainer", "dapo_megatron_trainer")
"""verl's `--config-name`: its defaults, in whose place stand those of this package."""

WILDCARD = ".*"


@dataclass(frozen=True, slots=True)
class Renamed:
    """Takes its value to another key."""

    key: str


@dataclass(frozen=True, slots=True)
class Unread:
    """Is named in the warning, unless its value stands in `values`: no number depends on it."""

    reason: str
    values: Mapping[Hashable, str] = field(default_factory=dict)
    """Accepted in silence, with what they are here: key=value pairs, "" for what happens anyway."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Is an error, unless its value stands in `values`: numbers or the model depend on it."""

    fix: str
    values: Mapping[Hashable, str] = field(default_factory=dict)
    """As in `Unread`."""


Row = Renamed | Unread | Refused


def _rows(row: Row, *keys: str) -> dict[str, Row]:
    return dict.fromkeys(keys, row)


_OFF: Mapping[Hashable, str] = {False: "", None: ""}
_ON: Mapping[Hashable, str] = {True: ""}
_UNSET: Mapping[Hashable, str] = {None: ""}

_RECOMPUTE = " ".join(
    f"actor.megatron.override_transformer_config.recompute_{option}"
    for option in ("granularity=full", "method=uniform", "num_layers=1")
)
_NOT_OFFLOADED = Unread("weights, gradients and optimizer stay on their device", _OFF)
_SPEED = "changes speed or memory alone"
_SHARDS = "Megatron shards by actor.megatron"
_REFERENCE = "the reference is laid out as the actor"
_LOGPROBS = "log-probabilities are computed in the micro-batches of training"
_SYNC = "weights reach the engine within its process"
_NO_REWARD_MODEL = "there is no reward model"
_PROFILER = "there is no profiler"
_NO_RAY = "processes are started by torchrun"

TABLE: dict[str, Row] = {
    # actor
    "actor.strategy": Unread("actors are Megatron's", {"megatron": ""}),
    "model_engine": Unread("actors are Megatron's", {"megatron": ""}),
    "actor.use_gpg_loss": Refused(
        "Set actor.policy_loss.loss_mode.", {True: "actor.policy_loss.loss_mode=gpg", False: ""}
    ),
    "actor.use_token_level_loss": Refused(
        "Set actor.loss_agg_mode.",
        {
            True: "actor.loss_agg_mode=token-mean",
            False: "actor.loss_agg_mode=seq-mean-token-mean",
        },
    ),
    "actor.ppo_micro_batch_size": Refused("Set actor.ppo_micro_batch_size_per_gpu.", _UNSET),
    "actor.shuffle": Refused("The minibatches of a step keep the order of its prompts.", _OFF),
    "actor.data_loader_seed": Unread("the minibatches of a step keep the order of its prompts"),
    "actor.tis_imp_ratio_cap": Refused(
        "Set algorithm.rollout_correction.rollout_is=token and .rollout_is_threshold.",
        {-1: "", None: ""},
    ),
    "actor.load_weight": Refused("Training starts from the weights in model.path.", _ON),
    "actor.checkpoint.async_save": Renamed("trainer.async_save"),
    "actor.checkpoint.load_contents": Refused("A checkpoint is resumed whole."),
    "actor.checkpoint.save_contents": Unread("a checkpoint is whole, trainer.export_hf_model"),
    "actor.ulysses_sequence_parallel_size": Renamed("actor.megatron.context_parallel_size"),
    "actor.fsdp_config.ulysses_sequence_parallel_size": Renamed(
        "actor.megatron.context_parallel_size"
    ),
    "actor.fsdp_config.dtype": Renamed("actor.megatron.dtype"),
    "actor.fsdp_config.model_dtype": Refused(
        "The optimizer's weights are float32.", {"fp32": "", "float32": ""}
    ),
    **_rows(
        _NOT_OFFLOADED,
        "actor.fsdp_config.param_offload",
        "actor.fsdp_config.optimizer_offload",
        "actor.fsdp_config.offload_policy",
        "actor.megatron.param_offload",
        "actor.megatron.grad_offload",
        "actor.megatron.optimizer_offload",
        "actor.optim.override_optimizer_config.optimizer_cpu_offload",
        "actor.optim.override_optimizer_config.optimizer_offload_fraction",
        "actor.optim.override_optimizer_config.overlap_cpu_optimizer_d2h_h2d",
        "ref.fsdp_config.param_offload",
        "ref.megatron.param_offload",
        "model.enable_activation_offload",
    ),
    **_rows(
        Unread(_SHARDS),
        "actor.fsdp_config.fsdp_size",
        "actor.fsdp_config.forward_prefetch",
        "actor.fsdp_config.reshard_after_forward",
        "actor.fsdp_config.wrap_policy.*",
    ),
    **_rows(
        Unread(_SPEED),
        "actor.entropy_checkpointing",
        "actor.entropy_from_logits_with_chunking",
        "actor.use_fused_kernels",
        "actor.use_torch_compile",
        "actor.fsdp_config.use_torch_compile",
        "actor.megatron.override_ddp_config.overlap_param_gather",
    ),
    # actor.megatron
    "actor.megatron.router_replay.mode": Renamed("actor.router_replay.mode"),
    "actor.megatron.override_ddp_config.overlap_grad_reduce": Renamed(
        "actor.megatron.overlap_grad_reduce"
    ),
    "actor.megatron.override_ddp_config.grad_reduce_in_fp32": Refused(
        "Gradients are reduced in float32.", _ON
    ),
    "actor.megatron.override_mcore_model_config.*": Refused("Change config.json in model.path."),
    "actor.megatron.use_dist_checkpointing": Refused("Set model.path to the model's folder.", _OFF),
    "actor.megatron.dist_checkpointing_path": Refused(
        "Set model.path to the model's folder.", _UNSET
    ),
    **_rows(
        Unread("weights are converted by mcore_rl.models"),
        "actor.megatron.use_mbridge",
        "actor.megatron.vanilla_mbridge",
    ),
    # actor.optim
    "actor.optim.clip_grad": Renamed("actor.grad_clip"),
    "actor.optim.warmup_style": Renamed("actor.optim.lr_decay_style"),
    "actor.optim.lr_scheduler_type": Renamed("actor.optim.lr_decay_style"),
    "actor.optim.optimizer": Refused(
        "The optimizer is AdamW.", {"adam": "", "adamw": "", "AdamW": ""}
    ),
    "actor.optim.lr_warmup_init": Refused("The learning rate rises from 0.", {0: ""}),
    "actor.optim.lr_warmup_steps_ratio": Refused(
        "Set actor.optim.lr_warmup_steps.", {0: "", None: ""}
    ),
    "actor.optim.total_training_steps": Refused(
        "Set actor.optim.lr_decay_steps.", {-1: "", None: ""}
    ),
    "actor.optim.min_lr_ratio": Refused("Set actor.optim.min_lr.", {0: "", None: ""}),
    "actor.optim.num_cycles": Refused("A cosine falls once.", {0.5: "", None: ""}),
    "actor.optim.weight_decay_incr_style": Refused(
        "The weight decay is constant.", {"constant": ""}
    ),
    "actor.optim.use_checkpoint_opt_param_scheduler": Refused(
        "A resumed run takes its schedule from the command line.", _OFF
    ),
    # ref
    "ref.strategy": Unread("the reference is Megatron's", {"megatron": ""}),
    "ref.model": Refused("The reference is the model in model.path.", _UNSET),
    "ref.model.path": Refused("The reference is the model in model.path.", _UNSET),
    **_rows(
        Unread(_REFERENCE),
        "ref.ulysses_sequence_parallel_size",
        "ref.fsdp_config.fsdp_size",
        "ref.fsdp_config.forward_prefetch",
        "ref.fsdp_config.reshard_after_forward",
        "ref.fsdp_config.wrap_policy.*",
        "ref.megatron.tensor_model_parallel_size",
        "ref.megatron.pipeline_model_parallel_size",
        "ref.megatron.virtual_pipeline_model_parallel_size",
        "ref.megatron.context_parallel_size",
        "ref.megatron.expert_model_parallel_size",
        "ref.megatron.expert_tensor_parallel_size",
        "ref.megatron.sequence_parallel",
        "ref.megatron.use_mbridge",
        "ref.megatron.vanilla_mbridge",
        "ref.megatron.seed",
    ),
    **_rows(
        Unread(_SPEED),
        "ref.entropy_checkpointing",
        "ref.entropy_from_logits_with_chunking",
        "ref.use_torch_compile",
    ),
    # log-probabilities of the actor (rollout.log_prob_*) and of the reference
    **_rows(
        Unread(_LOGPROBS),
        *(
            f"{role}.log_prob_{option}"
            for role in ("rollout", "ref")
            for option in (
                "micro_batch_size",
                "micro_batch_size_per_gpu",
                "use_dynamic_bsz",
                "max_token_len_per_gpu",
            )
        ),
    ),
    # model
    "model.use_remove_padding": Unread("rows are always packed", _ON),
    "actor.use_remove_padding": Unread("rows are always packed", _ON),
    "model.enable_gradient_checkpointing": Refused(
        "It is true or false.", {True: _RECOMPUTE, False: ""}
    ),
    "model.gradient_checkpointing_kwargs.*": Refused(
        "Set recompute_granularity and the like in actor.megatron.override_transformer_config."
    ),
    "model.lora.rank": Renamed("model.lora_rank"),
    "model.lora.alpha": Renamed("model.lora_alpha"),
    "model.lora_adapter_path": Refused("Training starts from new adapters.", _UNSET),
    "model.exclude_modules": Refused("Name the layers in model.target_modules.", _UNSET),
    "model.custom_chat_template": Refused("Put it into the tokenizer's folder.", _UNSET),
    "model.external_lib": Refused("Name the module in MCORE_RL_PLUGINS.", _UNSET),
    "model.tokenizer_path": Refused("The tokenizer is that in model.path.", _UNSET),
    "model.override_config.attn_implementation": Unread("attention is Megatron's"),
    "model.override_config.moe_config.freeze_moe_router": Renamed(
        "actor.megatron.moe_router_freeze"
    ),
    **_rows(
        Refused("No pass has dropout.", {0: ""}),
        "model.override_config.attention_dropout",
        "model.override_config.embd_pdrop",
        "model.override_config.resid_pdrop",
    ),
    "model.override_config.*": Refused("Change config.json in model.path."),
    "model.trust_remote_code": Unread("no code of a model's folder is run", _OFF),
    **_rows(
        Unread(_SPEED),
        "model.fused_kernel_options.*",
        "model.use_fused_kernels",
        "model.use_liger",
        "model.use_shm",
    ),
    # data
    "data.tokenizer": Refused("The tokenizer is that in model.path.", _UNSET),
    "data.custom_cls.*": Refused("Write the rows in one of the forms that are read.", _UNSET),
    "data.sampler.*": Refused("The order is that of data.shuffle and data.seed.", _UNSET),
    "data.datagen.*": Refused("Write the rows in one of the forms that are read.", _UNSET),
    "data.multiturn.messages_key": Renamed("data.messages_key"),
    "data.multiturn.enable": Unread("rows without a response are conversations", _ON),
    "data.validation_shuffle": Unread("the order of validation changes nothing", _OFF),
    "data.trust_remote_code": Unread("no code of a data set is run", _OFF),
    **_rows(
        Unread("text alone is read"),
        "data.image_key",
        "data.video_key",
        "data.return_full_prompt",
        "data.return_multi_modal_inputs",
        "data.return_raw_chat",
        "data.return_raw_input_ids",
    ),
    **_rows(
        Unread(_SPEED),
        "data.dataloader_num_workers",
        "data.filter_overlong_prompts_workers",
        "data.use_shm",
    ),
    # rollout
    "rollout.mode": Unread("engines answer a batch at a time", {"sync": ""}),
    "rollout.prompt_length": Renamed("data.max_prompt_length"),
    "rollout.response_length": Renamed("data.max_response_length"),
    "rollout.do_sample": Refused("A greedy rollout carries no policy gradient.", _ON),
    "rollout.ignore_eos": Refused("A response ends with its end token.", _OFF),
    "rollout.calculate_log_probs": Unread("they are always returned", _ON),
    "rollout.enable_rollout_routing_replay": Refused(
        "Set actor.router_replay.mode.", {True: "actor.router_replay.mode=R3", False: ""}
    ),
    "rollout.enable_prefix_caching": Renamed("rollout.engine_kwargs.enable_prefix_caching"),
    "rollout.engine_kwargs.vllm.*": Renamed("rollout.engine_kwargs.*"),
    "rollout.engine_kwargs.sglang.*": Unread("the engine is vLLM"),
    "rollout.engine_kwargs.trtllm.*": Unread("the engine is vLLM"),
    **_rows(
        Refused("Every engine holds a whole model.", {1: ""}),
        "rollout.data_parallel_size",
        "rollout.expert_parallel_size",
        "rollout.pipeline_model_parallel_size",
    ),
    "rollout.quantization": Refused("The engine holds the trainer's weights.", _UNSET),
    "rollout.repetition_penalty": Refused("Samples are those of the policy.", {1: ""}),
    "rollout.over_sample_rate": Refused("Every prompt gets rollout.n responses.", {0: ""}),
    "rollout.skip_rollout": Refused("Every step generates.", _OFF),
    "rollout.multi_turn.enable": Refused("A response is one turn.", _OFF),
    "rollout.multi_turn.*": Unread("a response is one turn", _UNSET),
    "rollout.agent.num_workers": Unread("a response is one turn"),
    "rollout.agent.default_agent_loop": Refused(
        "A response is one turn.", {"single_turn_agent": ""}
    ),
    **_rows(
        Unread(_SYNC),
        "rollout.checkpoint_engine.*",
        "rollout.layered_summon",
        "rollout.load_format",
        "rollout.nccl_timeout",
        "rollout.update_weights_bucket_megabytes",
        "nccl_timeout",
    ),
    **_rows(
        Unread(_SPEED),
        "rollout.cudagraph_capture_sizes",
        "rollout.disable_log_stats",
        "rollout.enable_sleep_mode",
        "rollout.free_cache_engine",
        "rollout.multi_stage_wake_up",
        "rollout.scheduling_policy",
    ),
    "hybrid_engine": Refused("Actor and engine share their devices.", _ON),
    # algorithm
    "algorithm.use_pf_ppo": Refused("There is no preference feedback.", _OFF),
    "algorithm.pf_ppo.*": Unread("there is no preference feedback", _UNSET),
    "algorithm.rollout_correction.bypass_mode": Refused(
        "The trainer computes the old log-probabilities.", _OFF
    ),
    "algorithm.rollout_correction.rollout_is_batch_normalize": Refused(
        "Weights are not normalised.", _OFF
    ),
    "algorithm.rollout_correction.rollout_token_veto_threshold": Refused(
        "Set algorithm.rollout_correction.rollout_rs=token.", _UNSET
    ),
    **_rows(
        Refused("Set algorithm.rollout_correction.", _OFF),
        "algorithm.rollout_is",
        "algorithm.rollout_is_level",
        "algorithm.rollout_is_mode",
        "algorithm.rollout_is_threshold",
        "algorithm.rollout_is_threshold_lower",
        "algorithm.rollout_is_veto_threshold",
    ),
    # reward
    **_rows(
        Refused(
            "Set custom_reward_function.path to a function of one response or of a batch.",
            {"naive": "", "dapo": "", "prime": "", "batch": ""},
        ),
        "reward_model.reward_manager",
        "reward.reward_manager.name",
    ),
    **{
        f"{section}.{option}": row
        for section in (
            "custom_reward_function.overlong_buffer",
            "reward_model.overlong_buffer",
            "reward_model.reward_kwargs.overlong_buffer_cfg",
            "reward.reward_kwargs.overlong_buffer_cfg",
        )
        for option, row in {
            "enable": Renamed("reward.overlong_buffer.enable"),
            "len": Renamed("reward.overlong_buffer.len"),
            "penalty_factor": Renamed("reward.overlong_buffer.penalty_factor"),
            "log": Unread("the penalty is always logged", _ON),
        }.items()
    },
    "reward_model.reward_kwargs.max_resp_len": Renamed("data.max_response_length"),
    "reward.reward_kwargs.max_resp_len": Renamed("data.max_response_length"),
    "reward.custom_reward_function.*": Renamed("custom_reward_function.*"),
    "reward_model.num_workers": Renamed("reward.num_workers"),
    "reward_model.enable": Refused("Score by functions: custom_reward_function.path.", _OFF),
    "reward_model.sandbox_fusion.url": Refused("Programs run in reward.sandbox.", _UNSET),
    "reward_model.launch_reward_fn_async": Unread(_SPEED, _OFF),
    **_rows(
        Unread(_NO_REWARD_MODEL),
        "reward_model.enable_resource_pool",
        "reward_model.forward_max_token_len_per_gpu",
        "reward_model.max_length",
        "reward_model.micro_batch_size",
        "reward_model.micro_batch_size_per_gpu",
        "reward_model.model.*",
        "reward_model.strategy",
        "reward_model.use_dynamic_bsz",
    ),
    # critic
    "critic.strategy": Unread("actors and critics are Megatron's", {"megatron": ""}),
    "critic.megatron.*": Refused("A critic has the layout and options of actor.megatron."),
    "critic.ulysses_sequence_parallel_size": Refused(
        "A critic has the layout of actor.megatron.", {1: ""}
    ),
    "critic.ppo_micro_batch_size": Refused("Set critic.ppo_micro_batch_size_per_gpu.", _UNSET),
    "critic.shuffle": Refused("The minibatches of a step keep the order of its prompts.", _OFF),
    "critic.model.tokenizer_path": Refused("A critic reads the tokens of the actor.", _UNSET),
    "critic.model.use_remove_padding": Unread("rows are always packed", _ON),
    "critic.model.enable_gradient_checkpointing": Unread(
        "a critic recomputes what the actor does", _OFF
    ),
    **_rows(
        Unread("values are computed in the micro-batches of training"),
        "critic.forward_micro_batch_size",
        "critic.forward_micro_batch_size_per_gpu",
        "critic.forward_max_token_len_per_gpu",
    ),
    **_rows(
        _NOT_OFFLOADED,
        "critic.megatron.param_offload",
        "critic.megatron.grad_offload",
        "critic.megatron.optimizer_offload",
        "critic.model.fsdp_config.param_offload",
        "critic.model.fsdp_config.optimizer_offload",
    ),
    # trainer
    "trainer.balance_batch": Unread("devices are always balanced", _ON),
    "trainer.max_actor_ckpt_to_keep": Renamed("trainer.max_ckpt_to_keep"),
    "trainer.max_critic_ckpt_to_keep": Unread("trainer.max_ckpt_to_keep decides", _UNSET),
    "trainer.rollout_data_dir": Unread("samples.jsonl in the run folder has samples", _UNSET),
    "trainer.validation_data_dir": Unread("samples.jsonl in the run folder has samples", _UNSET),
    "trainer.default_hdfs_dir": Unread("everything is in the run folder", _UNSET),
    "trainer.del_local_ckpt_after_load": Unread("checkpoints are kept", _OFF),
    "trainer.device": Unread("CUDA is used where it is", _UNSET),
    "trainer.esi_redundant_time": Unread("a run goes on from its last checkpoint", {0: ""}),
    **_rows(
        Unread(_NO_RAY),
        "ray_init.*",
        "ray_kwargs.*",
        "trainer.ray_wait_register_center_timeout",
        "trainer.use_legacy_worker_impl",
        "transfer_queue.*",
    ),
    **_rows(
        Unread(_PROFILER),
        "actor.profiler.*",
        "global_profiler.*",
        "ref.profiler.*",
        "rollout.profiler.*",
        "rollout.trace.*",
        "trainer.profile_steps",
    ),
    "hydra.*": Unread("the run folder is trainer.default_local_dir"),
}
