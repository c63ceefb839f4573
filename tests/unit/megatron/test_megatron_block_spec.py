"""The layers' two kinds: which one is taken, and one name for every parameter of both."""

import re

import pytest

from mcore_rl.errors import UserError
from mcore_rl.megatron.block_spec import canonical_parameter_name, transformer_impl
from mcore_rl.megatron.config import MegatronConfig
from tests.actor_inputs import actor_spec
from tests.unit.megatron.block_spec_cases import checkpoint_names

LAYER = "decoder.layers.3."

# Parameters of one layer under Transformer Engine's spec: TELayerNormColumnParallelLinear keeps
# its norm as layer_norm_weight and layer_norm_bias, TEGroupedLinear its experts as weight0, ...
# (extensions/transformer_engine.py and moe/experts.py of Megatron-Core 0.16.1 and 0.19.2).
TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.weight": None,
    "self_attention.linear_qkv.bias": None,
    "self_attention.q_layernorm.weight": None,
    "self_attention.k_layernorm.weight": None,
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": None,
    "self_attention.linear_kv_down_proj.weight": None,
    "self_attention.linear_proj.weight": None,
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight": None,
    "mlp.linear_fc2.weight": None,
    "pre_mlp_layernorm.weight": None,
    "mlp.router.weight": None,
    "mlp.experts.linear_fc1.weight0": "mlp.experts.local_experts.0.linear_fc1.weight",
    "mlp.experts.linear_fc2.weight0": "mlp.experts.local_experts.0.linear_fc2.weight",
    "mlp.experts.linear_fc1.weight17": "mlp.experts.local_experts.17.linear_fc1.weight",
    "mlp.experts.local_experts.5.linear_fc1.weight": None,
    "mlp.shared_experts.linear_fc1.weight": None,
    "mlp.shared_experts.linear_fc2.weight": None,
}


@pytest.mark.parametrize(("name", "expected"), TRANSFORMER_ENGINE_NAMES.items())
def test_a_parameter_of_transformer_engine_gets_the_local_specs_name(name, expected):
    assert canonical_parameter_name(LAYER + name) == LAYER + (expected or name)


@pytest.mark.parametrize(
    "name", ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]
)
def test_names_outside_layers_stay(name):
    assert canonical_parameter_name(name) == name


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "qwen3_moe_mixed", "deepseek_v3"])
def test_the_names_in_checkpoints_are_canonical_ones_once_translated(
    processes, tiny_checkpoint, name
):
    """Checkpoints carry Transformer Engine's names of norms, whichever spec wrote them, so the two
    lists of names, that of the local spec's map and that of the translation, must agree."""
    ((local_names, names_in_checkpoint),) = processes.run(
        checkpoint_names, 1, actor_spec(tiny_checkpoint(name))
    )
    assert any("layer_norm_weight" in key for key in names_in_checkpoint.values())
    for local_name in local_names:
        if ".experts." not in local_name:  # all experts of a layer in one entry
            found = canonical_parameter_name(names_in_checkpoint[local_name])
            # Layers that are alike are stacked: their numbers are an axis and not in the name.
            assert found in (local_name, re.sub(r"\.layers\.\d+", ".layers", local_name))


def test_without_cuda_auto_means_the_local_spec():
    for dtype in ("float32", "bfloat16"):
        assert transformer_impl(MegatronConfig(dtype=dtype)) == "local"
    assert transformer_impl(MegatronConfig(transformer_impl="local")) == "local"


def test_transformer_engine_is_refused_where_it_cannot_run():
    with pytest.raises(UserError, match=r"transformer_impl='transformer_engine' needs a CUDA"):
        transformer_impl(MegatronConfig(transformer_impl="transformer_engine"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transformer_impl": "fused"}, "is not one of auto, local, transformer_engine"),
        ({"transformer_impl": "transformer_engine", "dtype": "float32"}, "not in float32"),
    ],
)
def test_settings_that_would_not_do_what_they_say_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        MegatronConfig(**settings)
