"""Slices of Hugging Face tensors <-> Megatron shards: the layouts, and that nothing is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.models.mappings import (
    Block,
    Column,
    GateUp,
    HfTensor,
    ParamEntry,
    Qkv,
    Replicated,
    Row,
    Vocab,
    hf_shapes,
    padded_vocab_size,
    take,
    to_hf,
    to_megatron,
)
from mcore_rl.models.spec import model_family

sizes = st.integers(min_value=1, max_value=5)


def reader_of(tensors):
    return lambda name, rows, cols: take(tensors[name], rows, cols)


def entry_of(mapping):
    return ParamEntry(megatron_name="parameter", mapping=mapping)


def test_every_family_round_trips_bit_exactly_at_every_tensor_parallel_size(hf_config):
    entries = model_family(hf_config).entries(hf_config)
    shapes = {name: shape for entry in entries for name, shape in hf_shapes(entry).items()}
    # Random bit patterns, NaNs among them: compared as integers, so equal means every bit.
    bits = {name: torch.randint(-(2**15), 2**15, shape) for name, shape in shapes.items()}
    hf = {name: tensor.to(torch.int16).view(torch.bfloat16) for name, tensor in bits.items()}
    for tp_size, etp_size in ((1, 1), (2, 1), (2, 2), (4, 2)):
        back = {}
        for entry in entries:
            n = etp_size if entry.is_expert else tp_size
            back |= to_hf(entry, [to_megatron(entry, rank, n, reader_of(hf)) for rank in range(n)])
        assert back.keys() == hf.keys()
        for name, tensor in hf.items():
            assert torch.equal(back[name].view(torch.int16), tensor.view(torch.int16)), name


def test_no_hf_tensor_belongs_to_two_parameters_and_no_parameter_is_listed_twice(hf_config):
    entries = model_family(hf_config).entries(hf_config)
    hf_names = [name for entry in entries for name in hf_shapes(entry)]
    megatron_names = [entry.megatron_name for entry in entries]
    assert len(set(hf_names)) == len(hf_names)
    assert len(set(megatron_names)) == len(megatron_names)


@st.composite
def mappings(draw):
    """A mapping of random sizes that divide by the shard count that comes with it."""
    tp_size = draw(st.sampled_from([1, 2, 3, 4]))
    hidden, rows = draw(sizes), draw(sizes)
    kind = draw(st.sampled_from(["column", "row", "gate_up", "qkv", "qkv_bias", "vocab"]))
    if kind == "column":
        return Column(HfTensor("x", (rows * tp_size, hidden))), tp_size
    if kind == "row":
        return Row(HfTensor("x", (rows, hidden * tp_size))), tp_size
    if kind == "gate_up":
        shape = (rows * tp_size, hidden)
        return GateUp(HfTensor("gate", shape), HfTensor("up", shape)), tp_size
    if kind == "vocab":
        return Vocab(HfTensor("x", (draw(st.integers(1, 20)), hidden)), draw(sizes)), tp_size
    # As many groups as ranks, more, or fewer: then a rank holds part of a group.
    groups, dim = draw(sizes), draw(sizes) * tp_size
    queries = draw(sizes)
    trailing = (hidden,) if kind == "qkv" else ()
    q = HfTensor("q", (groups * queries * dim, *trailing))
    k, v = (HfTensor(name, (groups * dim, *trailing)) for name in "kv")
    return Qkv(q, k, v, groups), tp_size


@given(mappings())
def test_the_blocks_of_all_ranks_cover_every_hf_element_exactly_once(case):
    mapping, tp_size = case
    counts = {hf.name: torch.zeros(hf.shape, dtype=torch.int) for hf in mapping.sources}
    heights = []
    for rank in range(tp_size):
        blocks = mapping.blocks(rank, tp_size)
        for block in blocks:
            take(counts[block.hf_name], block.rows, block.cols).add_(1)
        heights.append(sum(block.num_rows + block.num_pad_rows for block in blocks))
    assert all((count == 1).all() for count in counts.values())
    assert len(set(heights)) == 1


@given(mappings())
def test_a_random_mapping_round_trips(case):
    mapping, tp_size = case
    hf = {source.name: torch.randn(source.shape) for source in mapping.sources}
    entry = entry_of(mapping)
    shards = [to_megatron(entry, rank, tp_size, reader_of(hf)) for rank in range(tp_size)]
    back = to_hf(entry, shards)
    assert all(torch.equal(back[name], tensor) for name, tensor in hf.items())


def test_qkv_interleaves_query_groups_and_splits_between_ranks():
    # Two groups, two query heads each, head size 1; the value names head and kind.
    hf = {
        "q": torch.tensor([[10], [11], [12], [13]]),
        "k": torch.tensor([[20], [21]]),
        "v": torch.tensor([[30], [31]]),
    }
    mapping = Qkv(*(HfTensor(name, tuple(hf[name].shape)) for name in "qkv"), num_query_groups=2)

    def shard(rank, tp_size):
        return to_megatron(entry_of(mapping), rank, tp_size, reader_of(hf)).flatten().tolist()

    assert shard(0, 1) == [10, 11, 20, 30, 12, 13, 21, 31]
    assert shard(0, 2) == [10, 11, 20, 30]
    assert shard(1, 2) == [12, 13, 21, 31]
    assert [shard(rank, 4) for rank in range(4)] == [[10, 11], [20, 30], [12, 13], [21, 31]]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_what_is_made_of_one_parameter_lies_one_behind_the_other(tp_size):
    """So that an engine that fuses the same tensors can take them as one."""
    hf = {name: torch.randn(rows, 3) for name, rows in (("q", 4), ("k", 2), ("v", 2))}
    mapping = Qkv(*(HfTensor(name, tuple(hf[name].shape)) for name in "qkv"), num_query_groups=2)
    entry = entry_of(mapping)
    shards = [to_megatron(entry, rank, tp_size, reader_of(hf)) for rank in range(tp_size)]
    back = to_hf(entry, shards)
    whole = back["q"].as_strided((8, 3), (3, 1))
    assert torch.equal(whole, torch.cat([hf[name] for name in "qkv"]))


def test_gate_up_puts_the_gate_rows_of_each_rank_above_its_up_rows():
    hf = {"gate": torch.tensor([[1], [2], [3], [4]]), "up": torch.tensor([[5], [6], [7], [8]])}
    entry = entry_of(GateUp(HfTensor("gate", (4, 1)), HfTensor("up", (4, 1))))
    shards = [to_megatron(entry, rank, 2, reader_of(hf)).flatten().tolist() for rank in (0, 1)]
    assert shards == [[1, 2, 5, 6], [3, 4, 7, 8]]


def test_column_parallel_cuts_rows():
    hf = {"x": torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])}
    shard = to_megatron(entry_of(Column(HfTensor("x", (4, 2)))), 1, 2, reader_of(hf))
    assert shard.tolist() == [[5, 6], [7, 8]]


def test_row_parallel_cuts_columns():
    hf = {"x": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
    shard = to_megatron(entry_of(Row(HfTensor("x", (2, 4)))), 1, 2, reader_of(hf))
    assert shard.tolist() == [[3, 4], [7, 8]]


def test_vocabulary_is_padded_with_zero_rows_that_do_not_come_back():
    hf = {"x": torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]])}
    entry = entry_of(Vocab(HfTensor("x", (5, 1))))
    shards = [to_megatron(entry, rank, 4, reader_of(hf)) for rank in range(4)]
    # The last rank owns padding only, and still has to know dtype and width.
    assert [shard.tolist() for shard in shards] == [
        [[1.0], [2.0]],
        [[3.0], [4.0]],
        [[5.0], [0.0]],
        [[0.0], [0.0]],
    ]
    shards[3].fill_(9.0)
    assert torch.equal(to_hf(entry, shards)["x"], hf["x"])


@given(st.integers(1, 1000), st.integers(1, 8), st.integers(1, 128))
def test_padded_vocabulary_is_the_smallest_multiple_that_holds_it(vocab_size, tp_size, divisible):
    padded = padded_vocab_size(vocab_size, tp_size, divisible)
    assert padded % (tp_size * divisible) == 0
    assert vocab_size <= padded < vocab_size + tp_size * divisible


def test_a_replicated_parameter_is_whole_on_every_rank_and_one_shard_restores_it():
    hf = {"x": torch.randn(3)}
    entry = entry_of(Replicated(HfTensor("x", (3,))))
    shards = [to_megatron(entry, rank, 4, reader_of(hf)) for rank in range(4)]
    assert all(torch.equal(shard, hf["x"]) for shard in shards)
    assert torch.equal(to_hf(entry, shards[:1])["x"], hf["x"])


def test_reading_a_shard_touches_only_its_own_slices():
    hf = {"gate": torch.randn(8, 3), "up": torch.randn(8, 3)}
    entry = entry_of(GateUp(HfTensor("gate", (8, 3)), HfTensor("up", (8, 3))))
    num_elements = 0

    def counting_read(name, rows, cols):
        nonlocal num_elements
        part = take(hf[name], rows, cols)
        num_elements += part.numel()
        return part

    shard = to_megatron(entry, 1, 4, counting_read)
    assert num_elements == shard.numel() == 2 * 8 * 3 // 4


def test_every_expert_gets_its_own_weights(make_config):
    """Each tensor is filled with a number made from its layer, expert and kind."""
    config = make_config("qwen3_moe")
    kinds = {"gate_proj": 1, "up_proj": 2, "down_proj": 3}
    number = lambda layer, expert, kind: float(100 * layer + 10 * expert + kinds[kind])  # noqa: E731
    hf = {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight": torch.full(
            (32, 24) if kind == "down_proj" else (24, 32), number(layer, expert, kind)
        )
        for layer in range(config.num_hidden_layers)
        for expert in range(config.num_experts)
        for kind in kinds
    }
    experts = [entry for entry in model_family(config).entries(config) if entry.is_expert]
    assert len(experts) == 4 * 4 * 2
    for entry in experts:
        assert entry.layer is not None
        shard = to_megatron(entry, 1, 2, reader_of(hf))
        where = f"decoder.layers.{entry.layer}.mlp.experts.local_experts.{entry.expert}"
        if entry.megatron_name == f"{where}.linear_fc1.weight":
            gate, up = (
                number(entry.layer, entry.expert, kind) for kind in ("gate_proj", "up_proj")
            )
            assert shard.shape == (24, 32)
            assert (shard[:12] == gate).all()
            assert (shard[12:] == up).all()
        else:
            assert entry.megatron_name == f"{where}.linear_fc2.weight"
            assert shard.shape == (32, 12)
            assert (shard == number(entry.layer, entry.expert, "down_proj")).all()


def test_a_shard_of_the_wrong_shape_is_not_exported():
    entry = entry_of(Row(HfTensor("x", (2, 4))))
    with pytest.raises(AssertionError, match=r"parameter: shard of shape \(3, 2\)"):
        to_hf(entry, [torch.zeros(3, 2), torch.zeros(3, 2)])
    with pytest.raises(AssertionError, match=r"parameter: shard of shape \(2, 1\)"):
        to_hf(entry, [torch.zeros(2, 1), torch.zeros(2, 1)])  # would broadcast


def test_a_size_that_does_not_divide_is_not_cut():
    with pytest.raises(AssertionError, match="4 rows or columns do not divide into 3"):
        Row(HfTensor("x", (2, 4))).blocks(0, 3)


def test_blocks_of_a_bias_have_no_columns():
    mapping = Qkv(HfTensor("q", (4,)), HfTensor("k", (2,)), HfTensor("v", (2,)), 2)
    assert mapping.blocks(1, 2) == [
        Block("q", (2, 4)),
        Block("k", (1, 2)),
        Block("v", (1, 2)),
    ]
