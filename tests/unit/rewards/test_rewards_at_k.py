"""What k of n samples give, held against every subset; intervals against what they must hold."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.rewards.at_k import best_at, bootstrap_intervals, majority_at, sizes

SCORES = st.integers(-3, 3).map(float)
ANSWERS = st.sampled_from(["a", "b", "c", "d", "", None])
SAMPLES = st.lists(st.tuples(SCORES, ANSWERS), min_size=1, max_size=8)


def mean(numbers):
    numbers = [Fraction(number) for number in numbers]
    return sum(numbers) / len(numbers)


def subsets(samples, k):
    return list(itertools.combinations(samples, k))


@given(st.lists(st.lists(SCORES, min_size=6, max_size=6), min_size=1, max_size=4))
@settings(deadline=None)
def test_the_best_of_k_is_the_mean_over_all_subsets(rows):
    for k in range(1, 7):
        expected = [float(mean(max(s) for s in subsets(row, k))) for row in rows]
        # float64, sums of six terms of at most 3.
        np.testing.assert_allclose(best_at(np.array(rows), k), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_of_zeros_and_ones_the_best_is_the_unbiased_chance_that_any_is_one(n):
    for right in range(n + 1):
        scores = np.array([[1.0] * right + [0.0] * (n - right)])
        for k in sizes(n):
            expected = 1 - math.comb(n - right, k) / math.comb(n, k)
            assert best_at(scores, k) == pytest.approx([expected], abs=1e-13)


def majority(subset, samples):
    """Return the score of what most of the subset say, as the docstring has it."""
    votes = Counter(answer for _, answer in subset if answer)
    most = max(votes.values(), default=0)
    winners = [answer for answer in votes if votes[answer] == most]
    if not winners:
        return mean(score for score, answer in samples if not answer)
    return mean(mean(score for score, answer in samples if answer == one) for one in winners)


@given(SAMPLES)
@settings(deadline=None, max_examples=200)
def test_the_majority_of_k_is_the_mean_over_all_subsets(samples):
    scores, answers = zip(*samples, strict=True)
    ks = range(1, len(samples) + 1)
    expected = [float(mean(majority(s, samples) for s in subsets(samples, k))) for k in ks]
    # float64, counts of up to 70 subsets and scores of at most 3.
    np.testing.assert_allclose(majority_at(scores, answers, list(ks)), expected, rtol=0, atol=1e-13)


def test_of_many_samples_the_majority_is_near_that_of_subsets_that_are_drawn():
    """Too many to list: 64 samples, ten answers, a third of them silent."""
    rng = np.random.default_rng(3)
    answers = [str(a) if a else "" for a in rng.integers(0, 4, 64) * rng.integers(0, 4, 64)]
    scores = [float(answer == "4") for answer in answers]
    samples = list(zip(scores, answers, strict=True))
    drawn = [
        float(majority([samples[i] for i in rng.choice(64, 8, replace=False)], samples))
        for _ in range(4000)
    ]
    error = float(np.std(drawn)) / math.sqrt(len(drawn))
    assert majority_at(scores, answers, [8])[0] == pytest.approx(np.mean(drawn), abs=4 * error)
    assert error < 0.01


def test_one_sample_is_as_good_as_the_mean_and_all_of_them_as_the_group():
    scores, answers = [1.0, 0.0, 0.0, 1.0, 0.0], ["4", "5", "5", "4", ""]
    assert best_at(np.array([scores]), 1) == pytest.approx([0.4])
    one, all_of_them = majority_at(scores, answers, [1, 5])
    assert one == pytest.approx(0.4)
    assert all_of_them == 0.5  # two votes for either


@pytest.mark.parametrize(
    ("n", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_powers_of_two_and_the_whole_group_are_reported(n, expected):
    assert sizes(n) == expected


def test_the_largest_group_is_within_the_range_of_floats():
    """That of rollout.val_kwargs.n, in the subset size of which there are most."""
    scores = [1.0] * 20 + [0.0] * 980
    expected = 1 - math.comb(980, 500) / math.comb(1000, 500)
    assert best_at(np.array([scores]), 500) == pytest.approx([expected])
    assert majority_at(scores, ["a"] * 20 + [""] * 980, [500]) == pytest.approx([expected])


def test_an_interval_is_the_spread_of_the_mean_over_samples_of_the_prompts():
    """That of a share p of P prompts deviates by sqrt(p (1 - p) / P)."""
    right = np.array([[1.0]] * 300 + [[0.0]] * 100)
    low, high = bootstrap_intervals(right, np.ones_like(right))
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    # A percentile of 1000 resamples is off by about a tenth of the deviation, 0.002.
    assert low[0] == pytest.approx(0.75 - half, abs=0.008)
    assert high[0] == pytest.approx(0.75 + half, abs=0.008)


def test_intervals_weigh_prompts_and_are_the_same_every_time():
    """A prompt without a value has no part in the mean; one value only has no spread."""
    sums = np.array([[4.0, 2.0], [0.0, 2.0], [2.0, 2.0]])
    weights = np.array([[2.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    low, high = bootstrap_intervals(sums, weights)
    assert low.tolist() == high.tolist() == [2.0, 2.0]
    sums[0, 0] = 5.0
    first, second = (bootstrap_intervals(sums, weights) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first[0][0] == 2.0
    assert first[1][0] == 2.5
