"""What the families say about a configuration, and what they refuse."""

import dataclasses
import json

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import GPT2Config
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from mcore_rl.errors import UserError
from mcore_rl.megatron.model import config_class
from mcore_rl.megatron.overrides import TABLE
from mcore_rl.models.layout import (
    check_engine_layout,
    check_layout,
    layers_of_stages,
)
from mcore_rl.models.spec import load_hf_config, model_family
from mcore_rl.types import Layout
from tests.tiny_models import MODELS, tiny_config


def names_of(config):
    return [entry.megatron_name for entry in model_family(config).entries(config)]


def test_entries_come_in_layer_order(hf_config):
    layers = [entry.layer for entry in model_family(hf_config).entries(hf_config)]
    inner = [layer for layer in layers if layer is not None]
    assert layers[0] is None
    assert layers[-1] is None
    assert inner == sorted(inner)
    assert set(inner) == set(range(hf_config.num_hidden_layers))
    assert layers[1 : 1 + len(inner)] == inner


def test_names_of_a_qwen2_layer(make_config):
    assert names_of(make_config("qwen2", num_hidden_layers=1)) == [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


def test_names_of_a_qwen3_moe_layer(make_config):
    assert names_of(make_config("qwen3_moe", num_hidden_layers=1, num_experts=2))[1:-2] == [
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.0.self_attention.k_layernorm.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight",
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight",
        "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight",
        "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight",
    ]


def test_names_of_a_deepseek_v3_layer(make_config):
    config = make_config("deepseek_v3", num_hidden_layers=1, first_k_dense_replace=0)
    assert names_of(config)[1:16] == [
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_q_down_proj.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.0.self_attention.linear_q_up_proj.weight",
        "decoder.layers.0.self_attention.linear_kv_down_proj.weight",
        "decoder.layers.0.self_attention.kv_layernorm.weight",
        "decoder.layers.0.self_attention.linear_kv_up_proj.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.router.weight",
        "decoder.layers.0.mlp.router.expert_bias",
        "decoder.layers.0.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.0.mlp.shared_experts.linear_fc2.weight",
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight",
        "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight",
    ]


def test_tied_embeddings_have_no_output_layer(make_config):
    tied, untied = make_config("qwen2_tied"), make_config("qwen2")
    assert set(names_of(untied)) - set(names_of(tied)) == {"output_layer.weight"}
    gpt_kwargs = model_family(tied).gpt_kwargs(tied, 2)
    assert gpt_kwargs["share_embeddings_and_output_weights"] is True


def test_experts_are_where_transformers_puts_them(make_config):
    config = make_config("qwen3_moe_mixed", decoder_sparse_step=1, mlp_only_layers=[0, 2])
    kwargs = model_family(config).transformer_kwargs(config)
    assert kwargs["moe_layer_freq"] == [0, 1, 0, 1]
    with_experts = {e.layer for e in model_family(config).entries(config) if e.is_expert}
    assert with_experts == {1, 3}


def test_megatron_accepts_the_arguments_of_every_family(hf_config):
    kwargs = model_family(hf_config).transformer_kwargs(hf_config)
    config = config_class(kwargs)(**kwargs)
    assert all(getattr(config, name) == value for name, value in kwargs.items())


def test_head_size_defaults_to_an_equal_share_of_the_hidden_size(make_config):
    qwen2, qwen3 = make_config("qwen2"), make_config("qwen3")
    assert model_family(qwen2).transformer_kwargs(qwen2)["kv_channels"] == 32 // 4
    assert model_family(qwen3).transformer_kwargs(qwen3)["kv_channels"] == 16


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_megatron_routes_as_transformers_does(make_config, norm_topk_prob):
    config = make_config("qwen3_moe", norm_topk_prob=norm_topk_prob)
    kwargs = model_family(config).transformer_kwargs(config)
    router = Qwen3MoeTopKRouter(config)
    torch.nn.init.normal_(router.weight)
    logits, weights, experts = router(torch.randn(32, config.hidden_size))
    probs, routing_map = topk_routing_with_score_function(
        logits,
        kwargs["moe_router_topk"],
        use_pre_softmax=kwargs["moe_router_pre_softmax"],
        score_function=kwargs["moe_router_score_function"],
    )
    expected = torch.zeros_like(probs).scatter(1, experts, weights)
    assert torch.equal(routing_map, expected > 0)
    # float32 (both sides fix it), sums of 4 terms in [0, 1]: a few units of 6e-8.
    torch.testing.assert_close(probs, expected, atol=1e-6, rtol=0)


def test_vocabulary_of_the_model_is_that_of_the_embedding_shards(make_config):
    config = make_config("qwen3")
    family = model_family(config)
    embedding = family.entries(config, vocab_divisible_by=8)[0]
    num_rows = sum(
        block.num_rows + block.num_pad_rows
        for rank in range(2)
        for block in embedding.mapping.blocks(rank, 2)
    )
    assert num_rows == family.gpt_kwargs(config, 2, vocab_divisible_by=8)["vocab_size"] == 64


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
REFUSALS = [
    ("qwen3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("qwen3", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True"),
    ("qwen2", {"attention_bias": False}, "attention_bias=False"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias=True"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, "sliding_window=4096"),
    ("qwen3_moe", {"use_sliding_window": True}, "sliding_window=4096"),
    (
        "qwen3",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type='dynamic' is none of default, linear, llama3, yarn",
    ),
    (
        "qwen3",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "num_hidden_layers=4 are all without"),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 8.0}}, "high_freq_factor=8.0"),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 1.2}}, "attention_factor=1.2"),
    ("llama", {"rope_parameters": YARN | {"mscale_all_dim": 1.0}}, "mscale=None"),
    (
        "glm4_moe",
        {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    ("mixtral", {"sliding_window": 4096}, "sliding_window=4096"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    ("mistral", {"sliding_window": 4096}, "sliding_window=4096"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ("olmoe", {"attention_bias": True}, "attention_bias=True"),
    ("olmoe", {"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06 is not 1e-05, with which vLLM"),
    ("qwen2_moe", {"use_sliding_window": True}, "sliding_window=4096"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config='fp8'"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config='fp8'"),
    ("deepseek_v3", {"rope_parameters": LLAMA3}, "rope_type='llama3' is neither default nor yarn"),
    ("deepseek_v3", {"rope_parameters": YARN | {"truncate": False}}, "truncate=False"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ("deepseek_v3", {"first_k_dense_replace": 4}, "num_hidden_layers=4 are all without"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias=True"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
    (
        "deepseek_v2",
        {"topk_group": 2},
        "topk_group=2 with num_experts_per_tok=4: .* best 2 experts, this model by its best 1",
    ),
    ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    ("glm4_moe", {"topk_group": 4}, "topk_group=4 with num_experts_per_tok=4: .* best 1 experts"),
]


@pytest.mark.parametrize(("case", "overrides", "message"), REFUSALS)
def test_what_cannot_be_expressed_is_refused_by_name(make_config, case, overrides, message):
    with pytest.raises(UserError, match=f"config.json: {message}"):
        model_family(make_config(case, **overrides))


def test_sliding_window_that_no_layer_uses_is_fine(make_config):
    config = make_config("qwen2", use_sliding_window=True, max_window_layers=4)
    assert config.sliding_window is not None
    model_family(config)


def write_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_rope_base_is_read_from_the_old_and_the_new_field(tmp_path):
    for fields in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}):
        config = load_hf_config(write_config(tmp_path, model_type="qwen3", **fields))
        assert model_family(config).gpt_kwargs(config, 1)["rotary_base"] == 5e5


def test_defaults_of_transformers_fill_in_missing_fields(tmp_path):
    config = load_hf_config(
        write_config(tmp_path, model_type="qwen2", num_attention_heads=8, num_key_value_heads=None)
    )
    assert model_family(config).transformer_kwargs(config)["num_query_groups"] == 8


def test_a_scaled_rope_in_the_old_spelling_is_read(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    folder = write_config(tmp_path, model_type="qwen3", rope_scaling=scaling, rope_theta=1e6)
    config = load_hf_config(folder)
    kwargs = model_family(config).transformer_kwargs(config)
    assert kwargs["yarn_rotary_scaling_factor"] == 4.0
    assert kwargs["yarn_original_max_position_embeddings"] == 32768


def test_a_folder_without_a_usable_configuration_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model.path=.* is not a folder"):
        load_hf_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model.path=.* has no config.json"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not the configuration of a model"):
        load_hf_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ' + "[" * 10**5 + "]" * 10**5 + "}")
    with pytest.raises(UserError, match=r"config\.json is not the configuration of a model.* deep"):
        load_hf_config(tmp_path)
    write_config(tmp_path, hidden_size=8)
    with pytest.raises(UserError, match="is not the configuration of a model"):
        load_hf_config(tmp_path)
    write_config(tmp_path, model_type="qwen3", num_hidden_layers="many")
    with pytest.raises(UserError, match=r"is refused by transformers: .*num_hidden_layers"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "missing"),
    [
        ({"type": "linear"}, "factor"),
        ({"type": "yarn"}, "factor"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "low_freq_factor",
        ),
    ],
)
def test_a_scaled_rope_that_lacks_a_number_is_refused(tmp_path, scaling, missing):
    folder = write_config(tmp_path, model_type="qwen3", rope_scaling=scaling)
    line = f"config.json is refused by transformers: .*Missing required keys.*'{missing}'"
    with pytest.raises(UserError, match=line):
        load_hf_config(folder)


def test_an_unknown_family_is_answered_with_those_that_are_known(tmp_path):
    """None is proposed: one of a near name is another architecture."""
    with pytest.raises(UserError, match=r"model_type='qwen3moe' is none of .*llama, .*qwen3_moe"):
        load_hf_config(write_config(tmp_path, model_type="qwen3moe"))
    with pytest.raises(UserError, match=r"model_type='gpt2' is none of .*llama, .*qwen3_moe"):
        model_family(GPT2Config())


@pytest.mark.parametrize(("model_type", "reason"), [("gpt_oss", "attention sinks")])
def test_a_family_that_megatron_lacks_something_for_is_refused_with_the_reason(
    tmp_path, model_type, reason
):
    message = f"config.json: model_type='{model_type}' is not supported: .*{reason}"
    with pytest.raises(UserError, match=message):
        load_hf_config(write_config(tmp_path, model_type=model_type))


GOOD_LAYOUTS = [
    ("qwen2", Layout(tp=2, pp=2, vpp=2)),
    ("qwen3", Layout(pp=3)),
    ("qwen3", Layout(tp=4, etp=4)),  # two ranks share each key and value head
    ("qwen3_moe", Layout(tp=2, ep=4, etp=2, pp=4)),
    # The dense MLP does not exist, so its size does not matter.
    ("qwen3_moe", Layout(tp=1, ep=2, etp=8)),
]


@pytest.mark.parametrize(("case", "layout"), GOOD_LAYOUTS)
def test_a_layout_that_divides_the_model_is_accepted_and_its_shards_exist(
    make_config, case, layout
):
    config = make_config(case)
    check_layout(config, layout)
    for entry in model_family(config).entries(config):
        entry.mapping.blocks(0, layout.etp if entry.is_expert else layout.tp)


BAD_LAYOUTS = [
    (
        "qwen3",
        {},
        Layout(tp=3),
        "tensor_model_parallel_size=3 does not divide num_attention_heads=4",
    ),
    (
        "qwen3",
        {"num_attention_heads": 12, "num_key_value_heads": 4},
        Layout(tp=3),
        "tensor_model_parallel_size=3 does not divide num_key_value_heads=4 .* that does: 2 or 4",
    ),
    (
        "qwen3",
        {"num_attention_heads": 12, "num_key_value_heads": 4},
        Layout(tp=6),
        "tensor_model_parallel_size=6 is neither .* num_key_value_heads=4",
    ),
    (
        "qwen3",
        {"intermediate_size": 30},
        Layout(tp=4),
        "tensor_model_parallel_size=4 does not divide intermediate_size=30",
    ),
    ("qwen3", {}, Layout(ep=2), "expert_model_parallel_size=2 has no effect"),
    ("qwen3", {}, Layout(tp=4, etp=2), "expert_tensor_parallel_size=2 has no effect"),
    ("qwen3", {}, Layout(pp=5), "pipeline_model_parallel_size=5 times .* num_hidden_layers=4"),
    (
        "qwen3",
        {},
        Layout(pp=2, vpp=3),
        "pipeline_model_parallel_size=2 times virtual_pipeline_model_parallel_size=3 is more than",
    ),
    ("qwen3_moe", {}, Layout(ep=3), "expert_model_parallel_size=3 does not divide num_experts=4"),
    (
        "qwen3_moe",
        {"moe_intermediate_size": 6},
        Layout(tp=4, etp=4),
        "expert_tensor_parallel_size=4 does not divide moe_intermediate_size=6",
    ),
    (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 14},
        Layout(tp=4),
        "tensor_model_parallel_size=4 does not divide hidden units of the shared experts=14",
    ),
    (
        "olmoe",
        {},
        Layout(tp=4),
        "tensor_model_parallel_size=4 is more than num_key_value_heads=2 .* does: 2",
    ),
    (
        "qwen3_moe_mixed",
        {"intermediate_size": 30},
        Layout(tp=4),
        "tensor_model_parallel_size=4 does not divide intermediate_size=30",
    ),
]


@pytest.mark.parametrize(("case", "overrides", "layout", "message"), BAD_LAYOUTS)
def test_a_layout_that_does_not_divide_the_model_is_refused_by_key(
    make_config, case, overrides, layout, message
):
    with pytest.raises(UserError, match=rf"actor\.megatron\.{message}"):
        check_layout(make_config(case, **overrides), layout)


def test_stages_get_all_layers_and_the_last_ones_fewer():
    assert layers_of_stages(61, Layout(pp=8)) == [8, 8, 8, 8, 8, 7, 7, 7]
    assert layers_of_stages(5, Layout(pp=2, vpp=2)) == [2, 1, 1, 1]
    assert layers_of_stages(6, Layout(pp=3)) == [2, 2, 2]


def test_experts_under_tensor_parallelism_need_sequence_parallelism(make_config):
    layout = Layout(tp=2, etp=2)
    with pytest.raises(UserError, match=r"actor\.megatron\.sequence_parallel=False cannot train"):
        check_layout(make_config("qwen3_moe"), layout, sequence_parallel=False)
    check_layout(make_config("qwen3_moe"), layout, sequence_parallel=True)
    check_layout(make_config("qwen3"), Layout(tp=2), sequence_parallel=False)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("deepseek_v3", {}, {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
        ("deepseek_v2", {"topk_method": "greedy"}, {"n_group": 1, "topk_group": 1}),
        ("deepseek_v2", {}, {}),
        ("qwen3_moe", {}, {}),
    ],
)
def test_an_engine_is_told_what_it_would_not_take_from_the_configuration(name, changes, told):
    """vLLM gives a router a softmax and no biases unless fields say otherwise that transformers
    does not write, and groups whatever topk_method says."""
    config = tiny_config(name, **changes)
    assert model_family(config).engine_overrides(config) == told


@pytest.mark.parametrize(
    ("sizes", "tp", "nearest"),
    [
        # 6 and 12 divide the heads, and not what Megatron fuses of all heads.
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 5, "4"),
        # 4 divides the heads and not the MLP.
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 18}, 3, "2"),
    ],
)
def test_a_suggested_tensor_parallel_size_divides_all_of_the_model(sizes, tp, nearest):
    config = tiny_config("qwen2", **sizes)
    with pytest.raises(UserError, match=f"Nearest that does: {nearest}\\.$"):
        check_layout(config, Layout(tp=tp))
    for size in nearest.split(" or "):
        check_layout(config, Layout(tp=int(size)))


def test_an_engine_whose_ranks_do_not_divide_the_heads_is_refused():
    config = tiny_config("qwen2")  # 4 query heads, 2 of keys and values
    for size in (1, 2, 4):
        check_engine_layout(config, size, "rollout.tensor_model_parallel_size")
    with pytest.raises(
        UserError, match=r"rollout\.tensor.*=3 does not divide num_attention_heads=4 .*: 2 or 4\."
    ):
        check_engine_layout(config, 3, "rollout.tensor_model_parallel_size")


def test_an_override_of_what_any_family_sets_is_refused_whatever_the_family_of_the_run():
    """A dense model that is told of experts, or of a gate that others have, would not fit its
    weights, or be another model."""
    families = [tiny_config(name) for name in MODELS]
    set_by = [set(model_family(config).transformer_kwargs(config)) for config in families]
    of_megatron = {field.name for field in dataclasses.fields(TransformerConfig)}
    not_by_all = (set.union(*set_by) - set.intersection(*set_by)) & of_megatron
    assert {"num_moe_experts", "moe_shared_expert_gate"} <= not_by_all
    assert not_by_all <= {row.field for row in TABLE}
