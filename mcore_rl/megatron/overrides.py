"""Which fields of Megatron's TransformerConfig a run may not override: one table, field -> why.

Megatron takes many more settings than a run leaves open. Those that have a key of their own are set
by that key; those that would train another model than the engine samples from, give other numbers
in another layout, or be passed over, are refused. What is in no row is handed on as it is.

Imports no Megatron: a configuration is checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import UserError, closest_hint, require
from mcore_rl.megatron.config import MegatronConfig

KEY = "actor.megatron.override_transformer_config"


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """What else of a run decides whether a field may be overridden."""

    megatron: MegatronConfig
    lora_rank: int = 0
    """0: without adapters."""
    router_replay: str = "disabled"
    """`actor.router_replay.mode`."""
    is_plan: bool = False
    """Whether the run is planned alone."""

    @property
    def tp(self) -> int:
        return self.megatron.tensor_model_parallel_size

    @property
    def cp(self) -> int:
        return self.megatron.context_parallel_size

    @property
    def pp(self) -> int:
        return self.megatron.pipeline_model_parallel_size

    def override(self, field: str) -> Any:
        """Return what a field is overridden with; None where it is not."""
        return self.megatron.override_transformer_config.get(field)


def _always(value: Any, run: Circumstances) -> bool:
    return True


def _is_sinkhorn(value: Any, run: Circumstances) -> bool:
    return "sinkhorn" in str(value)


def _is_aux_loss_without_coefficient(value: Any, run: Circumstances) -> bool:
    return "aux_loss" in str(value) and not run.override("moe_aux_loss_coeff")


def _is_coefficient_without_aux_loss(value: Any, run: Circumstances) -> bool:
    return bool(value) and "aux_loss" not in str(run.override("moe_router_load_balancing_type"))


def _is_on_where_rows_are_cut(value: Any, run: Circumstances) -> bool:
    return bool(value) and run.tp * run.cp > 1


def _is_on_where_routes_are_replayed(value: Any, run: Circumstances) -> bool:
    return bool(value) and run.router_replay != "disabled"


def _is_other_than_alltoall_in_a_pipeline(value: Any, run: Circumstances) -> bool:
    return run.pp > 1 and value != "alltoall"


def _is_on_without_flex(value: Any, run: Circumstances) -> bool:
    return bool(value) and run.override("moe_token_dispatcher_type") != "flex"


def _divides_the_layers_of_one_stage(value: Any, run: Circumstances) -> bool:
    vpp = run.megatron.virtual_pipeline_model_parallel_size or 1
    return bool(value) and run.pp * vpp == 1


def _routers_are_frozen(value: Any, run: Circumstances) -> bool:
    return run.megatron.moe_router_freeze


def _has_adapters(value: Any, run: Circumstances) -> bool:
    return run.lora_rank > 0


def _is_planned(value: Any, run: Circumstances) -> bool:
    return run.is_plan


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field may not be overridden."""

    field: str
    rule: str
    """As part of a message; what stands in braces is of `Circumstances`."""
    fix: str = "Remove it."
    applies: Callable[[Any, Circumstances], bool] = _always
    """Whether it is refused, by the value and the circumstances."""


_NOISE = "makes the log-probabilities of one policy differ from pass to pass"
_NEIGHBOURS = "makes what becomes of a token depend on the micro-batch it is in"
_EXCHANGE = "hangs or swaps messages between pipeline stages unless it is left as it is"
_LAYOUT = "has another gradient in every layout that cuts rows (tensor {run.tp}, context {run.cp})"
_ONE_STAGE = "divides the layers over the stages of a pipeline, and there is one"
_STAGES_FIX = "Remove it, or raise actor.megatron.pipeline_model_parallel_size."

_OPTIONS = {
    "tensor_model_parallel_size": "tensor_model_parallel_size",
    "pipeline_model_parallel_size": "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size": "virtual_pipeline_model_parallel_size",
    "context_parallel_size": "context_parallel_size",
    "expert_model_parallel_size": "expert_model_parallel_size",
    "expert_tensor_parallel_size": "expert_tensor_parallel_size",
    "sequence_parallel": "sequence_parallel",
    "params_dtype": "dtype",
    "pipeline_dtype": "dtype",
    "bf16": "dtype",
    "fp16": "dtype",
    "transformer_impl": "transformer_impl",
}
"""Fields that have a key of their own below `actor.megatron`."""

ARCHITECTURE = (
    "add_qkv_bias",
    "apply_query_key_layer_scaling",
    "apply_residual_connection_post_layernorm",
    "activation_func_clamp_value",
    "attention_output_gate",
    "experimental_attention_variant",
    "glu_linear_offset",
    "heterogeneous_block_specs",
    "is_hybrid_model",
    "layernorm_zero_centered_gamma",
    "linear_attention_freq",
    "moe_apply_probs_on_input",
    "moe_ffn_hidden_size",
    "moe_latent_size",
    "moe_layer_freq",
    "moe_router_enable_expert_bias",
    "moe_router_group_topk",
    "moe_router_num_groups",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk",
    "moe_router_topk_limited_devices",
    "moe_router_topk_scaling_factor",
    "moe_shared_expert_gate",
    "moe_shared_expert_intermediate_size",
    "mtp_num_layers",
    "multi_latent_attention",
    "no_rope_freq",
    "num_moe_experts",
    "qk_l2_norm",
    "rotary_interleaved",
    "softmax_scale",
    "softmax_type",
    "window_attn_skip_freq",
    "window_size",
)
"""Fields that make another model of the same weights, or one that these weights do not fit, and
that not every family of models/ sets; those that the family of the run sets `check_architecture`
refuses."""

PIPELINE_SPLITS = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
"""Fields by which a user divides the layers over the pipeline."""

ROUTER_LOSSES = (
    "moe_aux_loss_coeff",
    "moe_router_bias_update_rate",
    "moe_router_load_balancing_type",
    "moe_z_loss_coeff",
)
"""Fields that change what is optimized; a run keeps them when it is resumed."""

TABLE = (
    *(
        Refusal(field, f"is set by actor.megatron.{option}", "Set that instead.")
        for field, option in _OPTIONS.items()
    ),
    # Otherwise the gradient depends on the micro-batches; see forward_backward.py.
    Refusal(
        "calculate_per_token_loss",
        "would scale the loss a second time: it is scaled for calculate_per_token_loss=true",
    ),
    # With dropout, or routers that draw (in evaluation too), the ratio to the old policy is noise
    # and never 1.
    Refusal("hidden_dropout", _NOISE),
    Refusal("attention_dropout", _NOISE),
    Refusal("moe_input_jitter_eps", _NOISE),
    Refusal("moe_router_force_load_balancing", _NOISE),
    # A capacity drops tokens, and Sinkhorn's routing moves them, for the sake of others; the engine
    # does neither.
    Refusal("moe_expert_capacity_factor", _NEIGHBOURS),
    Refusal("moe_router_load_balancing_type", _NEIGHBOURS, applies=_is_sinkhorn),
    # The engine knows nothing of what the trainer's Megatron is told beside config.json.
    *(
        Refusal(
            field,
            "would train another model than the engine samples from",
            "Remove it: config.json decides.",
        )
        for field in ARCHITECTURE
    ),
    # Micro-batches are rows of different lengths. Megatron's other settings of the exchange hang or
    # swap messages between two stages (p2p_communication.py:185), and its other dispatchers refuse
    # such rows (transformer_config.py:1829).
    Refusal("variable_seq_lengths", _EXCHANGE),
    Refusal("batch_p2p_comm", _EXCHANGE),
    Refusal("overlap_p2p_comm", _EXCHANGE),
    Refusal(
        "moe_token_dispatcher_type",
        "exchanges rows of one length only, not those of {run.pp} pipeline stages",
        applies=_is_other_than_alltoall_in_a_pipeline,
    ),
    # Megatron reads what the flexible dispatcher is made of where it is chosen, and nowhere else.
    *(
        Refusal(
            field,
            "has no effect without moe_token_dispatcher_type=flex",
            "Set that too, or remove it.",
            _is_on_without_flex,
        )
        for field in ("moe_enable_deepep", "moe_flex_dispatcher_backend")
    ),
    # Megatron would build the layers of one stage alone, and the rest of the model would be neither
    # trained nor saved.
    *(
        Refusal(field, _ONE_STAGE, _STAGES_FIX, _divides_the_layers_of_one_stage)
        for field in PIPELINE_SPLITS
    ),
    *(
        Refusal(
            field,
            "divides the layers in a way that trainer.dry_run=true does not know",
            "Leave it out of the plan.",
            _is_planned,
        )
        for field in PIPELINE_SPLITS
    ),
    # Megatron scales these losses by the tokens of one rank (moe/router.py:456-498), so where a row
    # is cut over ranks their gradient is a fraction of what it should be.
    Refusal("moe_aux_loss_coeff", _LAYOUT, "Leave it at 0.", _is_on_where_rows_are_cut),
    Refusal("moe_z_loss_coeff", _LAYOUT, "Leave it at 0.", _is_on_where_rows_are_cut),
    # Megatron passes over either of them without the other; here both are off unless given.
    Refusal(
        "moe_aux_loss_coeff",
        "has no effect without moe_router_load_balancing_type, which is none here",
        "Set moe_router_load_balancing_type=aux_loss too, or remove it.",
        _is_coefficient_without_aux_loss,
    ),
    Refusal(
        "moe_router_load_balancing_type",
        "has no effect without moe_aux_loss_coeff, which is 0 here",
        "Set moe_aux_loss_coeff too, or remove it.",
        _is_aux_loss_without_coefficient,
    ),
    Refusal(
        "moe_router_bias_update_rate",
        "would move routers that actor.megatron.moe_router_freeze=true leaves as they are",
        "Remove one of them.",
        _routers_are_frozen,
    ),
    Refusal(
        "moe_router_bias_update_rate",
        "would move routers that model.lora_rank={run.lora_rank} leaves as they are",
        "Remove one of them.",
        _has_adapters,
    ),
    Refusal(
        "moe_grouped_gemm",
        "puts experts into one layer, which cannot be adapted",
        applies=_has_adapters,
    ),
    # Megatron's fused routing does not look at what is to be replayed
    # (moe_utils.py:topk_routing_with_score_function).
    Refusal(
        "moe_router_fusion",
        "routes without looking at what actor.router_replay.mode={run.router_replay} replays",
        "Remove one of them.",
        _is_on_where_routes_are_replayed,
    ),
)


def check_overrides(run: Circumstances) -> None:
    """Raise a UserError for the first field that is overridden and may not be."""
    overrides = run.megatron.override_transformer_config
    for row in TABLE:
        if row.field in overrides:
            value = overrides[row.field]
            is_refused = row.applies(value, run)
            require(not is_refused, f"{KEY}.{row.field}", value, row.rule.format(run=run), row.fix)


def check_architecture(overrides: Mapping[str, Any], architecture: Collection[str]) -> None:
    """Raise a UserError if Megatron is told another architecture than that of config.json.

    Args:
        overrides: `override_transformer_config`.
        architecture: fields that the model's family sets.
    """
    for field, value in overrides.items():
        rule = "would train another model than that of config.json"
        require(field not in architecture, f"{KEY}.{field}", value, rule, "Remove it.")


def check_fields_exist(overrides: Mapping[str, Any], fields: Collection[str]) -> None:
    """Raise a UserError for a field that Megatron's TransformerConfig does not have.

    Args:
        overrides: `override_transformer_config`.
        fields: those that it has in the version that is installed.
    """
    for field in overrides:
        if field not in fields:
            raise UserError(
                f"{KEY}.{field}: TransformerConfig has no such field.{closest_hint(field, fields)}"
            )
