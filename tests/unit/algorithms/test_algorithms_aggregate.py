"""Aggregation modes as token weights: the worked example and the definition of each mode."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.algorithms.aggregate import AGG_MODES, token_weights
from mcore_rl.errors import UserError
from mcore_rl.segments import Segments
from mcore_rl.types import Denominators

FACTOR = 5.0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", [0, 1 / 4, 1 / 4, 1 / 4, 0, 1 / 4]),
        ("token-sum", [0, 1, 1, 1, 0, 1]),
        ("seq-mean-token-sum", [0, 1 / 2, 1 / 2, 1 / 2, 0, 1 / 2]),
        ("seq-mean-token-mean", [0, 1 / 6, 1 / 6, 1 / 6, 0, 1 / 2]),
        ("seq-mean-token-sum-norm", [0, 1 / 10, 1 / 10, 1 / 10, 0, 1 / 10]),
    ],
)
def test_weights_of_three_and_one_trained_tokens_are_those_of_the_docstring(mode, expected):
    segments = Segments.from_loss_masks([[False, True, True, True], [False, True]])
    denominators = Denominators(num_tokens=4, num_sequences=2)
    weights = token_weights(mode, segments, denominators, FACTOR)
    # float64: one or two divisions.
    assert weights.tolist() == pytest.approx(expected, rel=1e-15)


@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6),
    seed=st.integers(0, 100),
)
def test_weighted_sums_are_the_definitions_of_the_modes(masks, seed):
    segments = Segments.from_loss_masks(masks)
    generator = torch.Generator().manual_seed(seed)
    loss_T = torch.randn(len(segments.mask_T), generator=generator, dtype=torch.float64)
    rows = [
        row[mask]
        for row, mask in zip(
            loss_T.split([len(m) for m in masks]),
            segments.mask_T.split([len(m) for m in masks]),
            strict=True,
        )
    ]
    rows = [row for row in rows if len(row)]
    num_tokens, num_sequences = sum(map(len, rows)), len(rows)
    if not rows:
        return
    sums, means = sum(row.sum() for row in rows), sum(row.mean() for row in rows)
    expected = {
        "token-mean": sums / num_tokens,
        "token-sum": sums,
        "seq-mean-token-sum": sums / num_sequences,
        "seq-mean-token-mean": means / num_sequences,
        "seq-mean-token-sum-norm": sums / num_sequences / FACTOR,
    }
    assert tuple(expected) == AGG_MODES
    denominators = Denominators(num_tokens=num_tokens, num_sequences=num_sequences)
    for mode, value in expected.items():
        weights_T = token_weights(mode, segments, denominators, FACTOR)
        # float64, at most 30 terms of order 1.
        assert torch.allclose((weights_T * loss_T).sum(), value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mode", AGG_MODES)
def test_a_minibatch_without_trained_tokens_weighs_zero(mode):
    segments = Segments.from_loss_masks([[False, False]])
    denominators = Denominators(num_tokens=0, num_sequences=0)
    assert token_weights(mode, segments, denominators, FACTOR).tolist() == [0.0, 0.0]


def test_a_misspelt_mode_is_refused_with_the_closest_one():
    segments = Segments.from_loss_masks([[False, True]])
    with pytest.raises(UserError, match=r"actor\.loss_agg_mode.*Did you mean 'token-mean'"):
        token_weights("token-men", segments, Denominators(num_tokens=1, num_sequences=1))


@pytest.mark.parametrize("mode", AGG_MODES)
def test_tokens_of_a_cut_sequence_weigh_what_they_weigh_in_the_whole_one(mode):
    """Context parallelism: a rank holds a part of the tokens, the counts are of whole sequences."""
    row = Segments.from_loss_masks([[False, True, True, True, False, True], [False, True]])
    denominators = Denominators(num_tokens=9, num_sequences=4)
    whole_T = token_weights(mode, row, denominators, FACTOR)
    for index in ([0, 1, 4, 5], [2, 3, 6, 7]):
        part = replace(row, sequence_T=row.sequence_T[index], mask_T=row.mask_T[index])
        weights_T = token_weights(mode, part, denominators, FACTOR)
        assert weights_T.tolist() == whole_T[index].tolist()
