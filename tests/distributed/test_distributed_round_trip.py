"""Hugging Face -> Megatron in a layout -> Hugging Face: every tensor comes back bit by bit."""

import functools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import MODEL_FAMILIES, load_hf_config, model_family, routing
from tests import actor_cases
from tests.actor_inputs import EP2, EP4, ETP1, ETP2, PP2, TP2, VPP2, actor_spec, layout_id
from tests.carriers import make_sequence
from tests.tiny_models import MODELS, tiny_config

FAMILIES = {name: tiny_config(name) for name, model in MODELS.items() if not model.is_variant}
MIXTURES = [name for name, config in FAMILIES.items() if routing(config)]
DENSE = [name for name in FAMILIES if name not in MIXTURES]
LATENT = [name for name in FAMILIES if hasattr(FAMILIES[name], "kv_lora_rank")]

# The vocabulary of 61 is no multiple of two tensor-parallel ranks.
SIZES = {
    "usual": {},
    "kv2": {"num_key_value_heads": 2},  # as many groups as ranks
    # More groups than ranks, and layers that no two stages share equally.
    "odd": {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4},
}
LAYOUTS = [(2, TP2, "kv2"), (2, PP2, "odd"), (4, TP2 | PP2, "odd")]
MIXTURE_LAYOUTS = [
    (2, TP2 | ETP1, "kv2"),
    (2, PP2, "odd"),
    (2, EP2, "kv2"),
    (2, ETP2, "kv2"),
    (4, TP2 | PP2, "odd"),
    (4, PP2 | EP2, "odd"),
    (2, TP2 | EP2 | ETP1, "kv2"),
]
TABLE = [
    # Latent attention has no groups, and its tiny checkpoints have three layers.
    (name, world_size, megatron, "usual" if name in LATENT else sizes)
    for names, layouts in ((DENSE, LAYOUTS), (MIXTURES, MIXTURE_LAYOUTS))
    for name in names
    for world_size, megatron, sizes in layouts
]
OTHERS = [
    (name, world_size, megatron, "usual")
    for name, world_size, megatron in (
        ("qwen2", 1, {}),
        ("qwen3", 2, {}),
        ("qwen3_one_group", 2, TP2),
        ("qwen2_tied", 2, VPP2),
        ("llama", 2, VPP2),
        ("qwen3_moe_mixed", 1, {}),
        ("qwen3_moe_mixed", 2, PP2),
        ("qwen3_moe_four_layers", 2, VPP2),
        ("qwen3_moe", 4, TP2 | EP2),
        ("qwen3_moe", 4, TP2 | PP2 | EP2 | ETP1),
        ("deepseek_v3", 4, TP2 | EP4 | ETP1),
    )
]
SEQUENCES = [
    make_sequence(token_ids=list(ids), loss_mask=[False] + [True] * (len(ids) - 1))
    for ids in (range(20), range(60, 0, -3), [7, 3, 3, 41, 0, 19])
]


@pytest.fixture(scope="module")
def expected_logprobs():
    """Return a function: folder -> what transformers gives for `SEQUENCES`, one after another."""

    @functools.cache
    def compute(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=load_hf_config(folder), attn_implementation="eager"
        )
        found = []
        for sequence in SEQUENCES:
            token_ids = torch.tensor(sequence.token_ids[None]).long()
            with torch.no_grad():
                logprobs = model(token_ids).logits[:, :-1].log_softmax(-1)
            of_token = logprobs.gather(-1, token_ids[:, 1:, None])
            found.append(torch.cat([torch.zeros(1), of_token.flatten()]))
        return torch.cat(found)

    return compute


@pytest.mark.parametrize(("name", "world_size", "megatron", "sizes"), TABLE + OTHERS, ids=layout_id)
def test_weights_come_back_bit_by_bit_on_every_rank_and_as_a_folder(
    processes, tiny_checkpoint, expected_logprobs, tmp_path, name, world_size, megatron, sizes
):
    """Proves loading and export through the real model, whole layers in order, one per bucket, and
    that the model in between is the one that transformers loads."""
    source, target = tiny_checkpoint(name, **SIZES[sizes]), tmp_path / "exported"
    args = actor_spec(source, **megatron), str(target), SEQUENCES
    by_rank = processes.run(actor_cases.round_trip, world_size, *args)

    config = load_hf_config(source)
    entries = model_family(config).entries(config)
    in_order = [hf.name for entry in entries for hf in entry.mapping.sources]
    layers = [None, *range(config.num_hidden_layers), None]
    expected = read_all(source)
    assert experts_are_distinct(expected)
    for buckets, tensors, logprobs in by_rank:
        assert changed_tensors(tensors, expected) == []
        assert [layer_of(names) for names in buckets] == layers
        assert [tensor_name for names in buckets for tensor_name in names] == in_order
        # float32 log-probabilities down to -19; observed 1.8e-5.
        found = torch.cat([torch.tensor(values) for values in logprobs])
        torch.testing.assert_close(found, expected_logprobs(source), rtol=0, atol=1e-4)

    assert changed_tensors(read_all(target), expected) == []
    assert (target / "config.json").read_text() == (source / "config.json").read_text()


def test_every_family_is_in_the_table(tiny_checkpoint):
    found = set()
    for name in FAMILIES:
        config_file = tiny_checkpoint(name) / "config.json"
        found.add(json.loads(config_file.read_text())["model_type"])
    assert found == set(MODEL_FAMILIES)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_swapped_a_duplicated_and_a_lost_expert_would_be_seen(tiny_checkpoint, name):
    """Every expert of every layer has weights of its own, in every projection."""
    whole = read_all(tiny_checkpoint(name))
    assert experts_are_distinct(whole)
    assert changed_tensors(dict(whole), whole) == []
    experts = [name for name in whole if ".experts." in name]
    for first in experts:
        second = next(n for n in experts if n != first and n.split(".")[-2] == first.split(".")[-2])
        swapped = whole | {first: whole[second], second: whole[first]}
        assert changed_tensors(swapped, whole) == sorted([first, second])
        assert changed_tensors(whole | {first: whole[second]}, whole) == [first]
        assert changed_tensors({n: whole[n] for n in whole if n != first}, whole) == [first]


def read_all(folder):
    """Return every tensor of a checkpoint, by name."""
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.names()}


def changed_tensors(found, expected):
    """Return the names of tensors that are not equal or only in one of the two."""
    names = sorted(found.keys() | expected.keys())
    both = found.keys() & expected.keys()
    return [n for n in names if n not in both or not torch.equal(found[n], expected[n])]


def experts_are_distinct(tensors):
    """Whether no two tensors of experts are equal, so that one in place of another is seen."""
    experts = [tensor for name, tensor in tensors.items() if ".experts." in name]
    return len({tensor.numpy().tobytes() for tensor in experts}) == len(experts)


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
    args = spec, str(tmp_path / "exported"), SEQUENCES
    for _, tensors, _ in processes.run(actor_cases.round_trip, 2, *args):
        assert sorted(tensors) == reader.names()
        for tensor_name, tensor in tensors.items():
            expected = reader.read(tensor_name)
            if not tensor_name.endswith("e_score_correction_bias"):
                expected = expected.bfloat16()
            assert tensor.dtype == expected.dtype, tensor_name
            assert torch.equal(tensor, expected), tensor_name
    assert CheckpointReader(tmp_path / "exported").dtype("lm_head.weight") == torch.bfloat16
