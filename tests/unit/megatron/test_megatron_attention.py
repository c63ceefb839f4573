"""Packed attention against a softmax per sequence, written out.

Shapes: T packed tokens; heads, groups (of queries that share a key), d the size of a head.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.megatron.attention import (
    SHORT,
    causal_spans,
    packed_causal_attention,
    packed_flash_attention,
    span_rows,
)

SIZE = 6
SCALE = 0.37
RAGGED = (5, 1, 1, 9, 2, 8, 7, SHORT + 1, SHORT + 1, 1, 3, 16, SHORT + 2)


def random_inputs(seed, lengths, heads=4, groups=2):
    """Return query, key, value and a factor that makes a loss, [T, ., d] float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randn(sum(lengths), n, SIZE, generator=generator, dtype=torch.float64)

    return draw(heads), draw(groups), draw(groups), draw(heads)


def boundaries_of(lengths):
    return [0, *itertools.accumulate(lengths)]


def attention(query_T, key_T, value_T, boundaries, scale):
    spans = causal_spans(boundaries)
    return packed_causal_attention(query_T, key_T, value_T, spans, scale)


def naive_attention(query_T, key_T, value_T, boundaries, scale):
    """Return the softmax of each query over the keys of its sequence up to itself."""
    share = query_T.shape[1] // key_T.shape[1]
    key_T, value_T = key_T.repeat_interleave(share, 1), value_T.repeat_interleave(share, 1)
    rows = []
    for start, stop in itertools.pairwise(boundaries):
        for t in range(start, stop):
            scores = torch.einsum("hd,shd->hs", query_T[t], key_T[start : t + 1]) * scale
            rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), value_T[start : t + 1]))
    return torch.stack(rows)


def with_gradients(function, query, key, value, factor, lengths):
    """Return the output and the gradients of query, key and value."""
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    out = function(*leaves, boundaries_of(lengths), SCALE)
    (out * factor).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize(
    ("dtype", "atol"),
    # Sums of at most 33 products; observed 3e-15 and 8e-7.
    [(torch.float64, 1e-13), (torch.float32, 1e-5)],
)
def test_values_and_gradients_are_those_of_a_softmax_per_sequence(heads, groups, dtype, atol):
    inputs = random_inputs(0, RAGGED, heads, groups)
    expected = with_gradients(naive_attention, *inputs, RAGGED)
    inputs = [x.to(dtype) for x in inputs]
    found = with_gradients(attention, *inputs, lengths=RAGGED)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=atol)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12) | st.just(SHORT + 3), min_size=1, max_size=9).filter(any),
    seed=st.integers(0, 100),
)
def test_any_lengths_give_the_softmax_per_sequence(lengths, seed):
    """Lengths of 0 too: a boundary that is there twice."""
    *inputs, _ = random_inputs(seed, lengths)
    boundaries = boundaries_of(lengths)
    found = attention(*inputs, boundaries=boundaries, scale=SCALE)
    expected = naive_attention(*inputs, boundaries=boundaries, scale=SCALE)
    # float64, sums of at most 35 products; observed 1e-15.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(len(RAGGED))))
def test_a_permutation_of_the_sequences_permutes_outputs_and_gradients(order):
    inputs = random_inputs(1, RAGGED)
    parts = [x.split(RAGGED) for x in inputs]
    moved_inputs = [torch.cat([of_input[i] for i in order]) for of_input in parts]
    moved = with_gradients(attention, *moved_inputs, lengths=[RAGGED[i] for i in order])
    for ours, plain in zip(moved, with_gradients(attention, *inputs, RAGGED), strict=True):
        expected = torch.cat([plain.split(RAGGED)[i] for i in order])
        # float64; other neighbours give other paddings and other blocks; observed 1e-15.
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_a_sequence_and_later_tokens_cannot_reach_others():
    """Replacing a token by one of size 1000 changes bits only from it on, in its own sequence."""
    *inputs, _ = random_inputs(2, RAGGED)
    boundaries = boundaries_of(RAGGED)
    before = attention(*inputs, boundaries=boundaries, scale=SCALE)
    changed_token = boundaries[3] + 4
    for x in inputs:
        x[changed_token] = 1000 * torch.randn(x.shape[1:], dtype=x.dtype)
    after = attention(*inputs, boundaries=boundaries, scale=SCALE)
    changed_T = (before != after).flatten(1).any(-1)
    assert changed_T.nonzero().flatten().tolist() == list(range(changed_token, boundaries[4]))


def attention_by_span_rows(query_L, key_T, value_T, spans, scale):
    """Return what the flash kernel computes: the last query of every row sees the last key."""
    rows = span_rows(spans)
    if rows.key_positions is not None:
        key_T, value_T = key_T[rows.key_positions], value_T[rows.key_positions]
    share = query_L.shape[1] // key_T.shape[1]
    key_T, value_T = key_T.repeat_interleave(share, 1), value_T.repeat_interleave(share, 1)
    outputs = []
    bounds = zip(
        itertools.pairwise(rows.query_bounds), itertools.pairwise(rows.key_bounds), strict=True
    )
    for (first, last), (first_key, last_key) in bounds:
        for t in range(first, last):
            seen = slice(first_key, last_key - (last - 1 - t))
            scores = torch.einsum("hd,shd->hs", query_L[t], key_T[seen]) * scale
            outputs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), value_T[seen]))
    return torch.stack(outputs)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_rows_for_the_flash_kernel_say_what_the_spans_say(rank, size):
    """Short spans and long ones. Does not cover the kernel, which is for CUDA: tools/gpu_check.py
    does."""
    lengths = tuple(2 * size * n for n in (3, 1, 18, 4, 2))
    query, key, value, _ = random_inputs(3, lengths)
    spans = causal_spans(boundaries_of(lengths), rank, size)
    query_L = query[: sum(lengths) // size]
    found = attention_by_span_rows(query_L, key, value, spans, SCALE)
    expected = packed_causal_attention(query_L, key, value, spans, SCALE)
    # float64, sums of at most 108 products; observed 1e-15.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_the_flash_kernel_takes_what_it_is_given_and_has_gradients(rank, size):
    """On the meta device: the call is that of the installed torch, the shapes are right."""
    spans = causal_spans([0, 8, 12, 24], rank, size)

    def leaf(tokens, heads):
        shape = tokens, heads, 16
        return torch.zeros(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    query, key, value = leaf(24 // size, 4), leaf(24, 2), leaf(24, 2)
    out = packed_flash_attention(query, key, value, spans, SCALE)
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (query, key, value))
