"""Segments: sums, means and expansion over trained tokens, and their gradients."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.segments import HostSegments, Segments

MASKS = st.lists(st.lists(st.booleans(), min_size=1, max_size=6), max_size=5)


def test_loss_masks_become_segments_without_first_tokens():
    segments = Segments.from_loss_masks([[True, True, False], [False, True]])
    assert segments.sequence_T.tolist() == [0, 0, 0, 1, 1]
    assert segments.mask_T.tolist() == [False, True, False, False, True]
    assert segments.num_tokens_S.tolist() == [1.0, 1.0]


@given(masks=MASKS, seed=st.integers(0, 1000))
def test_sum_mean_and_expand_equal_a_loop_over_sequences(masks, seed):
    segments = Segments.from_loss_masks(masks)
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(len(segments.mask_T), generator=generator, dtype=torch.float64)
    rows = x_T.split([len(mask) for mask in masks])
    trained = [
        [x for i, (x, m) in enumerate(zip(row.tolist(), mask, strict=True)) if m and i > 0]
        for row, mask in zip(rows, masks, strict=True)
    ]
    # float64, at most 5 terms: only the order of additions may differ.
    expected_sum = torch.tensor([math.fsum(t) for t in trained], dtype=torch.float64)
    assert torch.allclose(segments.sum(x_T), expected_sum, rtol=0, atol=1e-14)
    means = [math.fsum(t) / len(t) if t else 0.0 for t in trained]
    expected_mean = torch.tensor(means, dtype=torch.float64)
    assert torch.allclose(segments.mean(x_T), expected_mean, rtol=0, atol=1e-14)
    expanded = segments.expand(expected_mean).split([len(mask) for mask in masks])
    for row, mask, mean in zip(expanded, masks, means, strict=True):
        assert row.tolist() == [mean if m and i > 0 else 0.0 for i, m in enumerate(mask)]


@given(masks=MASKS, seed=st.integers(0, 1000))
def test_segments_of_the_host_give_the_same_bits(masks, seed):
    general, of_host = Segments.from_loss_masks(masks), HostSegments.from_loss_masks(masks)
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(len(general.mask_T), generator=generator, dtype=torch.float64)
    x_S = torch.randn(len(masks), generator=generator, dtype=torch.float64)
    if masks:
        x_S[0] = math.nan  # which an untrained token must not see
    assert of_host.sum(x_T).equal(general.sum(x_T))
    assert of_host.mean(x_T).equal(general.mean(x_T))
    for values_S in (x_S, x_S.float(), x_S.nan_to_num().long()):
        found, expected = of_host.expand(values_S), general.expand(values_S)
        assert found.dtype == expected.dtype
        assert found.isnan().equal(expected.isnan())
        assert found.nan_to_num().equal(expected.nan_to_num())
        assert not found[~general.mask_T].any()


def test_untrained_tokens_leak_neither_value_nor_gradient_even_if_nan():
    segments = Segments.from_loss_masks([[False, True, False, True], [False, False]])
    x_T = torch.tensor(
        [math.nan, 1.0, math.inf, 3.0, math.nan, math.nan], dtype=torch.float64, requires_grad=True
    )
    mean_S = segments.mean(x_T)
    assert mean_S.tolist() == [2.0, 0.0]
    mean_S.sum().backward()
    assert x_T.grad is not None
    assert x_T.grad.tolist() == [0.0, 0.5, 0.0, 0.5, 0.0, 0.0]


def test_padding_without_any_sequence_sums_to_nothing():
    segments = Segments(
        sequence_T=torch.zeros(4, dtype=torch.int64),
        mask_T=torch.zeros(4, dtype=torch.bool),
        num_tokens_S=torch.zeros(0),
    )
    assert segments.sum(torch.ones(4)).shape == (0,)
    assert segments.expand(torch.zeros(0)).tolist() == [0.0] * 4


def test_counts_of_the_whole_sequence_survive_a_cut_of_its_tokens():
    whole = Segments.from_loss_masks([[False, True, True, True]])
    x_T = torch.tensor([0.0, 1.0, 2.0, 6.0], dtype=torch.float64)
    first, second = [
        Segments(
            sequence_T=whole.sequence_T[cut],
            mask_T=whole.mask_T[cut],
            num_tokens_S=whole.num_tokens_S,
        ).mean(x_T[cut])
        for cut in (slice(0, 2), slice(2, 4))
    ]
    assert (first + second).tolist() == whole.mean(x_T).tolist() == [3.0]
