"""Fields of Megatron's that a run may not override are refused by name; all others are let pass."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mcore_rl.errors import UserError
from mcore_rl.megatron.config import MegatronConfig
from mcore_rl.megatron.overrides import (
    KEY,
    PIPELINE_SPLITS,
    ROUTER_LOSSES,
    TABLE,
    Circumstances,
    check_architecture,
    check_fields_exist,
    check_overrides,
)

TP2 = {"tensor_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
AUX_LOSS = {"moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "seq_aux_loss"}


def check(overrides, megatron=None, **others):
    settings = {**(megatron or {}), "override_transformer_config": overrides}
    check_overrides(Circumstances(megatron=MegatronConfig(**settings), **others))


# (overrides, layout and the like, others, how the message begins)
REFUSED = [
    ({"expert_tensor_parallel_size": 1}, {}, {}, "=1 is set by actor.megatron.expert_tensor"),
    ({"fp16": True}, {}, {}, "=True is set by actor.megatron.dtype. Set that instead."),
    ({"transformer_impl": "local"}, {}, {}, "='local' is set by actor.megatron.transformer_impl."),
    ({"calculate_per_token_loss": False}, {}, {}, "=False would scale the loss a second time"),
    ({"attention_dropout": 0.1}, {}, {}, "=0.1 makes the log-probabilities of one policy differ"),
    ({"hidden_dropout": 0.1}, {}, {}, "=0.1 makes the log-probabilities of one policy differ"),
    ({"moe_input_jitter_eps": 0.01}, {}, {}, "=0.01 makes the log-probabilities of one policy"),
    ({"moe_router_force_load_balancing": True}, {}, {}, "=True makes the log-probabilities of"),
    ({"moe_expert_capacity_factor": 1.0}, {}, {}, "=1.0 makes what becomes of a token depend on"),
    ({"moe_router_load_balancing_type": ["sinkhorn"]}, {}, {}, "=['sinkhorn'] makes what becomes"),
    ({"softmax_scale": 0.5}, {}, {}, "=0.5 would train another model than the engine samples from"),
    ({"variable_seq_lengths": True}, PP2, {}, "=True hangs or swaps messages between pipeline"),
    ({"batch_p2p_comm": True}, PP2, {}, "=True hangs or swaps messages between pipeline stages"),
    ({"overlap_p2p_comm": True}, PP2, {}, "=True hangs or swaps messages between pipeline stages"),
    (
        {"moe_token_dispatcher_type": "allgather"},
        PP2,
        {},
        "='allgather' exchanges rows of one length only, not those of 2 pipeline stages. Remove it",
    ),
    ({"moe_enable_deepep": True}, {}, {}, "=True has no effect without moe_token_dispatcher_type"),
    (
        {"moe_flex_dispatcher_backend": "deepep", "moe_token_dispatcher_type": "alltoall"},
        {},
        {},
        "='deepep' has no effect without moe_token_dispatcher_type=flex. Set that too, or remove",
    ),
    (AUX_LOSS, TP2, {}, "=0.01 has another gradient in every layout that cuts rows (tensor 2, con"),
    (
        {"moe_z_loss_coeff": 1e-3},
        CP2,
        {},
        "=0.001 has another gradient in every layout that cuts rows (tensor 1, context 2). Leave",
    ),
    (
        {"moe_aux_loss_coeff": 0.01},
        {},
        {},
        "=0.01 has no effect without moe_router_load_balancing_type, which is none here. Set moe_",
    ),
    (
        {"moe_router_load_balancing_type": "seq_aux_loss"},
        {},
        {},
        "='seq_aux_loss' has no effect without moe_aux_loss_coeff, which is 0 here. Set moe_aux_",
    ),
    (
        {"moe_router_bias_update_rate": 0.001},
        {"moe_router_freeze": True},
        {},
        "=0.001 would move routers that actor.megatron.moe_router_freeze=true leaves as they are.",
    ),
    (
        {"moe_router_bias_update_rate": 0.001},
        {},
        {"lora_rank": 8},
        "=0.001 would move routers that model.lora_rank=8 leaves as they are. Remove one of them.",
    ),
    ({"moe_grouped_gemm": True}, {}, {"lora_rank": 8}, "=True puts experts into one layer, which"),
    (
        {"moe_router_fusion": True},
        {},
        {"router_replay": "R3"},
        "=True routes without looking at what actor.router_replay.mode=R3 replays. Remove one of",
    ),
    (
        {"num_layers_in_last_pipeline_stage": 2},
        {},
        {},
        "=2 divides the layers over the stages of a pipeline, and there is one. Remove it, or",
    ),
    (
        {"pipeline_model_parallel_layout": "E|t|L"},
        PP2,
        {"is_plan": True},
        "='E|t|L' divides the layers in a way that trainer.dry_run=true does not know. Leave it",
    ),
]


@pytest.mark.parametrize(("overrides", "megatron", "others", "expected"), REFUSED)
def test_what_a_run_may_not_override_is_refused(overrides, megatron, others, expected):
    with pytest.raises(UserError) as caught:
        check(overrides, megatron, **others)
    assert str(caught.value).startswith(f"{KEY}.{next(iter(overrides))}{expected}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "megatron", "others"),
    [
        ({"recompute_granularity": "selective", "moe_permute_fusion": True}, {}, {}),
        ({"moe_token_dispatcher_type": "allgather"}, {}, {}),
        ({"moe_token_dispatcher_type": "alltoall"}, PP2, {}),
        ({"moe_token_dispatcher_type": "flex", "moe_enable_deepep": True}, {}, {}),
        ({"moe_enable_deepep": False}, {}, {}),
        (AUX_LOSS, PP2, {}),
        ({"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}, TP2, {}),
        ({"moe_router_bias_update_rate": 0.001}, {}, {}),
        ({"moe_router_fusion": False}, {}, {"router_replay": "R3"}),
        ({"moe_router_fusion": True}, {}, {}),
        ({"moe_grouped_gemm": True}, {}, {}),
        ({"num_layers_in_last_pipeline_stage": 2}, PP2, {}),
        ({"account_for_loss_in_pipeline_split": False}, {}, {}),
    ],
)
def test_what_a_run_may_override_is_let_pass(overrides, megatron, others):
    check(overrides, megatron, **others)


def test_every_row_of_the_table_is_of_a_field_that_megatron_has():
    transformer_config = pytest.importorskip("megatron.core.transformer.transformer_config")
    known = {field.name for field in fields(transformer_config.TransformerConfig)}
    assert {row.field for row in TABLE} | {*ROUTER_LOSSES, *PIPELINE_SPLITS} <= known


def test_what_a_family_sets_is_not_overridden():
    with pytest.raises(UserError) as caught:
        check_architecture({"layernorm_epsilon": 1e-3}, {"num_layers", "layernorm_epsilon"})
    assert str(caught.value) == (
        f"{KEY}.layernorm_epsilon=0.001 would train another model than that of config.json. "
        "Remove it."
    )
    check_architecture({"moe_router_dtype": "fp64"}, {"num_layers"})


def test_an_unknown_field_is_refused_with_the_closest():
    known = ["recompute_granularity", "recompute_method"]
    check_fields_exist({"recompute_method": "uniform"}, known)
    with pytest.raises(UserError) as caught:
        check_fields_exist({"recompute_metod": "uniform"}, known)
    assert str(caught.value) == (
        f"{KEY}.recompute_metod: TransformerConfig has no such field. "
        "Did you mean 'recompute_method'?"
    )
