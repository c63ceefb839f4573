"""Rows cut over ranks: every position once, attention and sequence quantities of the whole row."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.data.batch import pack
from mcore_rl.megatron.attention import causal_spans, packed_causal_attention
from mcore_rl.megatron.context_parallel import local_positions
from mcore_rl.types import MicroBatch
from tests.actor_inputs import random_sequences
from tests.unit.megatron import context_parallel_cases as cases

SCALE = 0.4


def boundaries_of(chunks, size):
    """Return the boundaries of sequences of so many times 2 * size positions."""
    return (0, *itertools.accumulate(2 * size * n for n in chunks))


def test_the_example_of_the_module():
    assert local_positions((0, 8), 0, 2).tolist() == [0, 1, 6, 7]
    assert local_positions((0, 8), 1, 2).tolist() == [2, 3, 4, 5]


@given(chunks=st.lists(st.integers(0, 4), min_size=1, max_size=5), size=st.integers(2, 5))
def test_every_position_is_on_one_rank_and_ranks_hold_equal_parts_of_each_sequence(chunks, size):
    boundaries = boundaries_of(chunks, size)
    parts = [local_positions(boundaries, rank, size).tolist() for rank in range(size)]
    assert sorted(itertools.chain(*parts)) == list(range(boundaries[-1]))
    for start, stop in itertools.pairwise(boundaries):
        assert {sum(start <= i < stop for i in part) for part in parts} == {(stop - start) // size}


def test_a_sequence_that_does_not_divide_is_a_bug():
    with pytest.raises(AssertionError, match="aligned to 2"):
        local_positions((0, 6), 0, 2)


def with_gradients(inputs, spans):
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = packed_causal_attention(*leaves, spans=spans, scale=SCALE)
    out.sin().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any),
    size=st.integers(2, 4),
    seed=st.integers(0, 100),
)
def test_the_ranks_attention_together_is_that_of_the_whole_row(chunks, size, seed):
    """Outputs and query gradients lie at the rank's positions, key gradients add up over ranks."""
    boundaries = boundaries_of(chunks, size)
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(boundaries[-1], n, 6, generator=generator, dtype=torch.float64)
        for n in (4, 2, 2)
    )
    whole = with_gradients((query, key, value), causal_spans(boundaries))
    found = [torch.zeros_like(x) for x in whole]
    for rank in range(size):
        index = local_positions(boundaries, rank, size)
        parts = with_gradients((query[index], key, value), causal_spans(boundaries, rank, size))
        for total, part, place in zip(found, parts, (index, index, ..., ...), strict=True):
            total[place] += part
    for ours, theirs in zip(found, whole, strict=True):
        # float64, sums of at most 32 products; observed 2e-15.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [2, 4])
def test_a_mean_over_a_cut_sequence_has_the_value_and_gradient_of_the_whole(processes, size):
    sequences = random_sequences(3)
    generator = torch.Generator().manual_seed(4)
    whole = cases.row(sequences, size)
    values_T = torch.randn(len(whole.labels_T), generator=generator, dtype=torch.float64)
    factors_S = torch.randn(len(sequences), generator=generator, dtype=torch.float64)
    leaf_T = values_T.clone().requires_grad_()
    mean_S = whole.segments.mean(leaf_T)
    whole.segments.expand(factors_S * mean_S.exp()).sum().backward()
    gradient_T = torch.zeros_like(values_T)
    for found_S, index, part_L in processes.run(
        cases.sequence_quantities, size, sequences, values_T, factors_S
    ):
        torch.testing.assert_close(found_S, mean_S.detach(), rtol=1e-14, atol=1e-14)
        gradient_T[index] = part_L
    torch.testing.assert_close(gradient_T, leaf_T.grad, rtol=1e-13, atol=1e-14)


def test_what_was_cut_and_gathered_comes_back_by_sequence(processes):
    sequences = random_sequences(5)
    for values, local, whole in processes.run(cases.row_cut_and_gathered, 2, sequences):
        assert 2 * local == whole
        assert values.tolist() == [x for s in sequences for x in s.advantages]


def test_an_empty_micro_batch_can_be_cut():
    row = pack(MicroBatch.of([]), pad_token_id=0, device="cpu", align_sequence=8)
    boundaries = tuple(row.cu_seqlens_padded.tolist())
    assert [len(local_positions(boundaries, rank, 4)) for rank in range(4)] == [2] * 4
