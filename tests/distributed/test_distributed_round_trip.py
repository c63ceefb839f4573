"""Hugging Face -> Megatron in a layout -> Hugging Face: every tensor comes back bit by bit."""

import actor_cases
import pytest
import torch
from actor_inputs import EP2, EP4, ETP1, PP2, TP2, VPP2, actor_spec, layout_id
from transformers import AutoModelForCausalLM

from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import load_hf_config, model_family

CASES = [
    ("qwen2", 1, {}),
    ("qwen2", 2, TP2),
    ("qwen3", 2, {}),
    ("qwen3_one_group", 2, TP2),
    ("qwen2_tied", 2, TP2),
    ("qwen2_tied", 2, PP2),
    ("qwen2_tied", 2, VPP2),
    ("qwen3_moe_mixed", 1, {}),
    ("qwen3_moe_mixed", 2, EP2),
    ("qwen3_moe_mixed", 2, PP2),
    ("qwen3_moe", 2, TP2),
    ("qwen3_moe", 2, TP2 | EP2 | ETP1),
    ("qwen3_moe_four_layers", 2, VPP2),
    ("qwen3_moe", 4, TP2 | EP2),
    ("qwen3_moe", 4, TP2 | PP2 | EP2 | ETP1),
    ("llama", 2, TP2),
    ("llama", 2, PP2),
    ("llama", 2, VPP2),
    ("llama", 4, TP2 | PP2),
    ("mixtral", 2, EP2),
    ("mixtral", 2, TP2),
    ("qwen2_moe", 2, TP2 | EP2 | ETP1),
    ("qwen2_moe", 4, TP2 | EP2),
    ("qwen2_moe", 2, PP2),
    ("glm4_moe", 2, TP2),
    ("glm4_moe", 4, PP2 | EP2),
    ("glm4_moe", 4, TP2 | EP4 | ETP1),
    ("deepseek_v3", 2, TP2),
    ("deepseek_v3", 4, TP2 | EP4 | ETP1),
    ("moonlight", 2, EP2),
    ("moonlight", 2, PP2),
    ("deepseek_v2", 2, TP2 | EP2 | ETP1),
]


@pytest.mark.parametrize(("name", "world_size", "megatron"), CASES, ids=layout_id)
def test_weights_come_back_bit_by_bit_on_every_rank_and_as_a_folder(
    processes, tiny_checkpoint, tmp_path, name, world_size, megatron
):
    """Proves loading and export through the real model, whole layers in order, one per bucket, and
    that transformers computes the same from the exported folder. The vocabulary of 61 is padded
    for two tensor-parallel ranks.
    """
    source, target = tiny_checkpoint(name), tmp_path / "exported"
    spec = actor_spec(source, **megatron)
    by_rank = processes.run(actor_cases.round_trip, world_size, spec, str(target))

    config = load_hf_config(source)
    reader = CheckpointReader(source)
    assert_experts_differ(reader)
    layers = [None, *range(config.num_hidden_layers), None]
    entries = model_family(config).entries(config)
    in_order = [hf.name for entry in entries for hf in entry.mapping.sources]
    for buckets, tensors in by_rank:
        assert sorted(tensors) == reader.names()
        for tensor_name, tensor in tensors.items():
            assert torch.equal(tensor, reader.read(tensor_name)), tensor_name
        assert [layer_of(names) for names in buckets] == layers
        in_order = [
            hf.name for e in model_family(config).entries(config) for hf in e.mapping.sources
        ]
        assert [tensor_name for names in buckets for tensor_name in names] == in_order

    assert (target / "config.json").read_text() == (source / "config.json").read_text()
    token_ids = torch.arange(61).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(folder)(token_ids).logits
            for folder in (target, source)
        )
    assert torch.equal(ours, theirs)


def assert_experts_differ(reader):
    """No two experts may be equal, or one in the place of another would not be seen."""
    experts = [name for name in reader.names() if ".experts." in name]
    assert len({reader.read(name).numpy().tobytes() for name in experts}) == len(experts)


def layer_of(names):
    """Return the one layer that the tensors of a bucket belong to, None outside layers."""
    layers = {int(n.split(".")[2]) if n.startswith("model.layers.") else None for n in names}
    assert len(layers) == 1, names
    return layers.pop()


@pytest.mark.parametrize(
    ("name", "megatron"), [("qwen3_moe", TP2 | EP2 | ETP1), ("glm4_moe", TP2), ("glm4_moe", PP2)]
)
def test_a_bfloat16_model_exports_the_rounded_weights_and_exact_biases_of_routers(
    processes, tiny_checkpoint, tmp_path, name, megatron
):
    spec = actor_spec(tiny_checkpoint(name), dtype="bfloat16", **megatron)
    reader = CheckpointReader(tiny_checkpoint(name))
    args = spec, str(tmp_path / "exported")
    for _, tensors in processes.run(actor_cases.round_trip, 2, *args):
        assert sorted(tensors) == reader.names()
        for tensor_name, tensor in tensors.items():
            expected = reader.read(tensor_name)
            if not tensor_name.endswith("e_score_correction_bias"):
                expected = expected.bfloat16()
            assert tensor.dtype == expected.dtype, tensor_name
            assert torch.equal(tensor, expected), tensor_name
    assert CheckpointReader(tmp_path / "exported").dtype("lm_head.weight") == torch.bfloat16
