"""Exports come in buckets of bounded size, on those ranks that are to have them."""

import itertools
import math

import pytest
import torch

from mcore_rl.models.mappings import hf_shapes
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import load_hf_config, model_family
from tests import actor_cases
from tests.actor_inputs import EP2, EP4, ETP1, ETP2, PP2, TP2, VPP2, actor_spec, layout_id

LAYOUTS = [
    ("qwen3", 1, {}),
    ("qwen3_moe", 2, TP2 | ETP1),
    ("qwen3_moe", 2, PP2),
    ("qwen3_moe", 2, EP2),
    ("qwen3_moe", 2, ETP2),
    ("qwen2_tied", 2, VPP2),
    ("qwen3_moe", 4, TP2 | PP2 | EP2 | ETP1),
    ("qwen3_moe", 4, TP2 | EP2),
    ("deepseek_v3", 4, TP2 | EP4 | ETP1),
]
TINY, SMALL, LARGE = 1, 9000, 1 << 30
"""Bounds: each parameter alone; a few; whole layers."""


def read_all(folder):
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.names()}


@pytest.mark.parametrize("max_bytes", [TINY, SMALL, LARGE])
@pytest.mark.parametrize(("name", "world_size", "megatron"), LAYOUTS, ids=layout_id)
def test_buckets_hold_the_bound_and_together_the_model(
    processes, tiny_checkpoint, name, world_size, megatron, max_bytes
):
    """Proves for all ranks and for one receiving rank at each end of the layout: every bit, each
    tensor once, layers in order and not mixed, buckets no larger than the bound or one parameter,
    nothing on other ranks, and that all ranks make as many buckets."""
    folder = tiny_checkpoint(name)
    expected = read_all(folder)
    config = load_hf_config(folder)
    entries = model_family(config).entries(config)
    whole = [set(hf_shapes(entry)) for entry in entries]
    place = {hf_name: i for i, entry in enumerate(entries) for hf_name in hf_shapes(entry)}
    layer = {hf_name: entry.layer for entry in entries for hf_name in hf_shapes(entry)}
    stretch = [0]  # which layers, in the order of the mapping list
    for before, entry in itertools.pairwise(entries):
        stretch.append(stretch[-1] + (before.layer != entry.layer))

    for receivers in (None, {0}, {world_size - 1}):
        args = actor_spec(folder, **megatron), max_bytes, receivers
        by_rank = processes.run(actor_cases.received_in_buckets, world_size, *args)
        assert len({len(buckets) for buckets in by_rank}) == 1
        for rank, buckets in enumerate(by_rank):
            if receivers is not None and rank not in receivers:
                assert not any(buckets)
                continue
            got = [named for bucket in buckets for named in bucket]
            assert sorted(hf_name for hf_name, _ in got) == sorted(expected)
            for hf_name, tensor in got:
                assert torch.equal(tensor, expected[hf_name]), hf_name
            order = [stretch[place[hf_name]] for hf_name, _ in got]
            assert order == sorted(order)
            for bucket in buckets:
                names = {hf_name for hf_name, _ in bucket}
                assert len({layer[hf_name] for hf_name in names}) == 1
                size = sum(tensor.nbytes for _, tensor in bucket)
                assert size <= max_bytes or any(names <= parts for parts in whole)
            if max_bytes == LARGE:
                assert len(buckets) == stretch[-1] + 1


def test_experts_of_every_rank_are_in_every_bucket_of_a_layer(processes, tiny_checkpoint):
    """So that their ranks gather together, whatever the bound leaves room for."""
    folder = tiny_checkpoint("qwen3_moe")
    sizes = {name: tensor.nbytes for name, tensor in read_all(folder).items()}
    of_expert = sum(size for name, size in sizes.items() if "layers.0.mlp.experts.0." in name)
    args = actor_spec(folder, **EP2), 2 * of_expert, None
    buckets, _ = processes.run(actor_cases.received_in_buckets, 2, *args)
    num_experts = load_hf_config(folder).num_experts
    found = []
    for bucket in buckets:
        names = [name for name, _ in bucket if "layers.0.mlp.experts." in name]
        if names:
            found.append({int(name.split(".experts.")[1].split(".")[0]) for name in names})
    half = num_experts // 2
    assert set().union(*found) == set(range(num_experts))
    assert all({i - half for i in of if i >= half} == {i for i in of if i < half} for of in found)
    assert math.prod(len(of) for of in found) > 1
