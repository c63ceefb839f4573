"""Metrics of k of the n samples of a prompt: the best, the majority's answer, any right one.

Each is the mean over all subsets of k samples, without replacement, computed exactly: nothing is
drawn, and k = n is the group as it is. Only `bootstrap_intervals` draws, from a fixed seed.

Shapes: P prompts, n samples of each, K metrics, B resamples.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NUM_RESAMPLES = 1000
LEVEL = 0.95
"""Of the intervals."""


def sizes(n: int) -> list[int]:
    """Return the k that are reported of groups of n: 1, 2, 4, ... and n itself."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def best_at(scores: Floats, k: int) -> Floats:
    """Return the best score of k samples, [P].

        best@k = sum_i s_i C(i - 1, k - 1) / C(n, k),    s_1 <= ... <= s_n

    Of scores that are 0 or 1, c of them 1, that is pass@k = 1 - C(n - c, k) / C(n, k), the unbiased
    estimate of Chen et al. 2021, arXiv:2107.03374, section 2.1.

    Args:
        scores: [P, n] float64.
        k: 1 to n.
    """
    n = scores.shape[1]
    chances = np.array([comb(i, k - 1) / comb(n, k) for i in range(n)])
    return np.sort(scores, axis=1) @ chances


def majority_at(
    scores: Sequence[float], answers: Sequence[str | None], ks: Sequence[int]
) -> Floats:
    """Return the score of the answer that most of k samples of one prompt give, [len(ks)].

    Answers with equal votes win equally often. The score of an answer is the mean score of its
    samples. Samples without an answer do not vote; if no sample votes, the result is their mean
    score.

    Args:
        scores: n of them.
        answers: n texts; "" and None: without an answer.
        ks: each 1 to n.
    """
    votes = Counter(answer for answer in answers if answer)
    ranked = sorted(votes, key=lambda answer: (votes[answer], answer))
    of_answer = np.array([_mean_score(scores, answers, {answer}) for answer in ranked])
    num_silent = len(scores) - votes.total()
    of_silent = _mean_score(scores, answers, {"", None}) if num_silent else 0.0
    wins = of_answer @ _wins(tuple(votes[answer] for answer in ranked))  # [votes + 1]
    return np.array(
        [
            sum(comb(num_silent, k - x) * wins[x] for x in range(1, min(k + 1, len(wins))))
            / comb(len(scores), k)
            + of_silent * (comb(num_silent, k) / comb(len(scores), k))
            for k in ks
        ]
    )


def _mean_score(
    scores: Sequence[float], answers: Sequence[str | None], wanted: set[str | None]
) -> float:
    found = [score for score, answer in zip(scores, answers, strict=True) if answer in wanted]
    return sum(found) / len(found)


@functools.lru_cache(maxsize=4096)
def _wins(counts: tuple[int, ...]) -> Floats:
    """Return [answers, votes + 1]: of all subsets of x votes, how many each answer wins; one in
    which it is level with r - 1 others counts 1 / r.

    Args:
        counts: votes for each answer.
    """
    num_votes, kinds = sum(counts), sorted(set(counts))
    wins = np.zeros((len(kinds), num_votes + 1))
    for most in range(1, max(counts, default=0) + 1):
        # [1 + kinds, votes + 1, answers + 1]: first, how many subsets of x votes give no answer
        # more than `most` and r answers exactly so many; then, how many of these r answers have
        # each count, over all of the subsets.
        ways = np.zeros((1 + len(kinds), num_votes + 1, num_votes // most + 1))
        ways[0, 0, 0] = 1.0
        for count in counts:
            extended = np.zeros_like(ways)
            for votes in range(min(count, most) + 1):
                r = int(votes == most)
                added = comb(count, votes) * ways[:, : num_votes + 1 - votes, : ways.shape[2] - r]
                extended[:, votes:, r:] += added
                if r:
                    extended[1 + kinds.index(count), votes:, r:] += added[0]
            ways = extended
        wins += ways[1:, :, 1:] @ (1 / np.arange(1, ways.shape[2]))
    for i, kind in enumerate(kinds):
        wins[i] /= counts.count(kind)
    return wins[np.array([kinds.index(count) for count in counts], int)]


def bootstrap_intervals(sums: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the intervals of K means, two arrays [K]: percentiles of the means of
    NUM_RESAMPLES samples of the prompts, of P with replacement, from a fixed seed.

    The mean of some prompts is the sum of their `sums` over that of their `weights`; resamples
    without a weight do not count.

    Args:
        sums: [P, K] float64, of the values of a prompt.
        weights: [P, K] float64, how many values that are.
    """
    num_prompts = len(sums)
    chances = np.full(num_prompts, 1 / num_prompts)
    drawn = np.random.default_rng(0).multinomial(num_prompts, chances, NUM_RESAMPLES)  # [B, P]
    with np.errstate(invalid="ignore"):
        means = (drawn @ sums) / (drawn @ weights)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(means, (tail, 100 - tail), axis=0)
    return low, high
