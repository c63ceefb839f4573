"""Which layers LoRA adapts, and how their adapters are put together from PEFT's tensors."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mcore_rl.errors import UserError
from mcore_rl.models.lora import (
    adapted_rows,
    adapter_of,
    adapters_of,
    chosen_weights,
    linear_weights,
    write_peft_adapter,
)
from mcore_rl.models.mappings import hf_shapes, take, to_hf, to_megatron
from mcore_rl.models.spec import model_family


@pytest.fixture
def weights(hf_config):
    return linear_weights(model_family(hf_config).entries(hf_config))


def test_every_linear_layer_of_attention_mlp_and_experts_is_adapted_and_nothing_else(
    hf_config, weights
):
    adapted = {hf for weight in weights for hf in hf_shapes(weight)}
    all_tensors = {
        hf: shape
        for entry in model_family(hf_config).entries(hf_config)
        for hf, shape in hf_shapes(entry).items()
    }
    kept = ("embed_tokens.weight", "lm_head.weight", ".gate.weight", "_gate.weight")
    expected = {
        hf for hf, shape in all_tensors.items() if len(shape) == 2 and not hf.endswith(kept)
    }
    assert adapted == expected


@pytest.mark.parametrize("tp_size", [1, 2])
def test_an_adapter_is_cut_as_its_weight_is(weights, tp_size):
    """The product of the shards of B and A is the shard of the product, with the A that fused
    layers share; and the shards give back the full halves."""
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        adapter = adapter_of(weight, rank=3)
        full = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for half in (adapter.a, adapter.b)
            for name, shape in hf_shapes(half).items()
        }
        (a_name,) = hf_shapes(adapter.a)
        products = {
            hf: full[hf.replace(".weight", ".lora_B.weight")] @ full[a_name]
            for hf in hf_shapes(weight)
        }
        shards = {}
        for rank in range(tp_size):
            a, b, product = (
                to_megatron(entry, rank, tp_size, lambda n, r, c, t=tensors: take(t[n], r, c))
                for entry, tensors in (
                    (adapter.a, full),
                    (adapter.b, full),
                    (weight, products),
                )
            )
            torch.testing.assert_close(b @ a, product, rtol=0, atol=1e-12)
            shards.setdefault(adapter.a, []).append(a)
            shards.setdefault(adapter.b, []).append(b)
        for half, parts in shards.items():
            assert all(torch.equal(full[name], x) for name, x in to_hf(half, parts).items())


def test_layers_are_chosen_by_hugging_face_names(make_config):
    config = make_config("qwen3_moe_mixed", mlp_only_layers=[0, 1, 2])
    weights = linear_weights(model_family(config).entries(config))
    chosen = chosen_weights(weights, ["o_proj", "up_proj", "gate_proj"])
    kinds = {weight.megatron_name.rpartition("linear_")[2] for weight in chosen}
    assert kinds == {"proj.weight", "fc1.weight"}
    assert len(chosen) == 4 + 3 + 4  # attention; dense layers; the experts of one layer


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["o_prj"], "'o_prj' is not one of down_proj, gate_proj, .* Did you mean 'o_proj'?"),
        (["lm_head"], "'lm_head' is not one of"),
    ],
)
def test_names_that_cannot_be_adapted_are_refused(make_config, modules, message):
    config = make_config("qwen3")
    weights = linear_weights(model_family(config).entries(config))
    with pytest.raises(UserError, match=message) as error:
        chosen_weights(weights, modules)
    assert str(error.value).startswith("model.target_modules=")


def test_a_part_of_what_is_fused_is_adapted_alone(make_config, tmp_path):
    """The most common choice; key rows of the fused B count as 0 on every rank."""
    config = make_config("qwen3")
    weights = linear_weights(model_family(config).entries(config))
    adapters = adapters_of(weights, 3, ["q_proj", "v_proj"])
    assert len(adapters) == config.num_hidden_layers
    for tp_size in (1, 2, 4):
        shards: list[Any] = [adapted_rows(adapters[0], rank, tp_size) for rank in range(tp_size)]
        rows = to_hf(
            replace(adapters[0].b, mapping=adapter_of(adapters[0].weight, 1).b.mapping), shards
        )
        assert {
            name.split(".")[-3]: set(values.flatten().tolist()) for name, values in rows.items()
        } == {
            "q_proj": {1.0},
            "k_proj": {0.0},
            "v_proj": {1.0},
        }
    assert adapted_rows(adapters_of(weights, 3, None)[0], 0, 1) is None
    found = {
        name: torch.randn(shape)
        for adapter in adapters
        for half in (adapter.a, adapter.b)
        for name, shape in hf_shapes(half).items()
    }
    write_peft_adapter(tmp_path / "adapter", adapters, found, base="base", rank=3, alpha=6)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "v_proj"}
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj", "v_proj"]


def test_the_written_files_have_pefts_names_and_keys(make_config, tmp_path):
    """As in PEFT's guide to its checkpoint format: the names of the base model's layers after
    "base_model.model.", without the adapter's name; A is [r, in], B is [out, r]."""
    config = make_config("qwen3_moe", num_hidden_layers=1, num_experts=2)
    adapters = [
        adapter_of(weight, 3) for weight in linear_weights(model_family(config).entries(config))
    ]
    found = {
        name: torch.randn(shape)
        for adapter in adapters
        for half in (adapter.a, adapter.b)
        for name, shape in hf_shapes(half).items()
    }
    folder = tmp_path / "adapter"
    write_peft_adapter(folder, adapters, found, base="base", rank=3, alpha=6)
    tensors = load_file(folder / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0"
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"{layer}.{module}.lora_{half}.weight": shape
        for module, rows, cols in (
            ("self_attn.q_proj", 64, 32),
            ("self_attn.k_proj", 32, 32),
            ("self_attn.v_proj", 32, 32),
            ("self_attn.o_proj", 32, 64),
            *((f"mlp.experts.{e}.gate_proj", 24, 32) for e in range(2)),
            *((f"mlp.experts.{e}.up_proj", 24, 32) for e in range(2)),
            *((f"mlp.experts.{e}.down_proj", 32, 24) for e in range(2)),
        )
        for half, shape in (("A", (3, cols)), ("B", (rows, 3)))
    }
    shared = tensors[f"{layer}.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(tensors[f"{layer}.self_attn.v_proj.lora_A.weight"], shared)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (
        3,
        6,
        "base",
    )
    assert written["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
