"""Sequences to micro-batches: who computes what, and in how many pieces.

A minibatch (one optimizer update) is cut once, on the host, into micro-batches for every
data-parallel rank. Two cuts: a token budget (`TokenBudget`) or a number of sequences
(`SequenceCount`).

Invariants, for every input:
1. every sequence is in exactly one micro-batch, in the order of the list that is planned;
2. every rank has the same number of micro-batches, a multiple of what was asked, at least one;
   micro-batches may be empty;
3. no micro-batch exceeds the cut;
4. the same input gives the same plan;
5. the denominators count the whole minibatch, so neither the cut nor the number of ranks changes
   the objective.

Costs are balanced twice: over the micro-batches of all ranks, and over the ranks. The i-th
micro-batches of all ranks cost about the same, because expert-parallel ranks wait for each other in
every layer.

Worked example: lengths 6 5 4 3 2, two ranks, a budget of 8 tokens. Best-fit packing needs three
micro-batches (6+2, 5+3, 4), so each rank gets two. The sequences go, longest first, each to the
cheapest of the four that has room: 6 | 5 | 4 | 3+2. Costliest first they are dealt in rows of two,
each row's costliest to the rank that has least: rank 0 gets 6 then 4, rank 1 gets 5 then 3+2, ten
tokens each.

It does not pad, make tensors, or see a device (`data/batch.py` does).
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mcore_rl import metrics
from mcore_rl.errors import UserError, require
from mcore_rl.metrics import Metrics
from mcore_rl.types import Denominators, MinibatchPlan, SampleGroup, TokenSequence

_ATTENTION_TOKENS = 12 * 4096
"""Sequence length at which causal attention costs as much as the rest of a dense layer: 12 times
the hidden size. One value for all models: it only steers balance, never results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBudget:
    """Micro-batches of at most `max_tokens` tokens (`use_dynamic_bsz=true`)."""

    max_tokens: int
    key: str = "actor.ppo_max_token_len_per_gpu"
    """Config key that the number came from, for messages."""

    def __post_init__(self) -> None:
        require(self.max_tokens > 0, self.key, self.max_tokens, "must be > 0")

    @property
    def capacity(self) -> int:
        return self.max_tokens

    def size(self, num_tokens: int) -> int:
        """Return what a sequence of `num_tokens` takes of `capacity`."""
        return num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCount:
    """Micro-batches of at most `num_sequences` sequences (`use_dynamic_bsz=false`)."""

    num_sequences: int
    key: str = "actor.ppo_micro_batch_size_per_gpu"
    """Config key that the number came from, for messages."""

    def __post_init__(self) -> None:
        require(self.num_sequences > 0, self.key, self.num_sequences, "must be > 0")

    @property
    def capacity(self) -> int:
        return self.num_sequences

    def size(self, num_tokens: int) -> int:
        """Return what a sequence of any length takes of `capacity`: 1."""
        return 1


Cut = TokenBudget | SequenceCount


def split_minibatches(
    groups: Sequence[SampleGroup], ppo_mini_batch_size: int
) -> list[list[SampleGroup]]:
    """Return the groups of each optimizer update, in order; a size counts prompts.

    Raises:
        UserError: if the size does not divide the number of groups.
    """
    require(
        ppo_mini_batch_size > 0 and len(groups) % ppo_mini_batch_size == 0,
        "actor.ppo_mini_batch_size",
        ppo_mini_batch_size,
        f"does not divide the {len(groups)} prompts of a step",
        "Choose a divisor of data.train_batch_size.",
    )
    starts = range(0, len(groups), ppo_mini_batch_size)
    return [list(groups[start : start + ppo_mini_batch_size]) for start in starts]


def plan_minibatch(
    sequences: Sequence[TokenSequence], dp_size: int, cut: Cut, *, multiple_of: int = 1
) -> MinibatchPlan:
    """Return the micro-batches of all ranks with the denominators of the whole minibatch.

    Args and errors are those of `plan_micro_batches`.
    """
    lengths = [len(sequence.token_ids) for sequence in sequences]
    trained = [sequence.num_trained_tokens for sequence in sequences]
    return MinibatchPlan(
        lengths=lengths,
        micro_batches=plan_micro_batches(lengths, dp_size, cut, multiple_of=multiple_of),
        denominators=Denominators(
            num_tokens=sum(trained), num_sequences=sum(count > 0 for count in trained)
        ),
    )


def plan_micro_batches(
    lengths: Sequence[int], dp_size: int, cut: Cut, *, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Return the micro-batches of every data-parallel rank, each the positions of its sequences.

    Args:
        lengths: tokens of the sequences of the minibatch, in any order, without the padding that
            alignment may add.
        dp_size: data-parallel ranks.
        cut: what a micro-batch may hold.
        multiple_of: the number of micro-batches per rank is a multiple of it; an interleaved
            pipeline schedule needs its number of stages.

    Raises:
        UserError: if a sequence is longer than the token budget.
    """
    sizes = [cut.size(length) for length in lengths]
    longest = max(sizes, default=0)
    if longest > cut.capacity:
        raise UserError(
            f"{cut.key}={cut.capacity} is smaller than a sequence of {longest} tokens (prompt and "
            f"response). Raise it to at least {longest}, or lower data.max_prompt_length or "
            "data.max_response_length."
        )
    costs = [_cost(length) for length in lengths]
    tight = _best_fit(sizes, cut.capacity)
    per_rank = max(1, math.ceil(len(tight) / dp_size / multiple_of)) * multiple_of
    num_bins = dp_size * per_rank
    bins = _even_fit(costs, sizes, cut.capacity, num_bins)
    if bins is None:
        bins = tight + [[] for _ in range(num_bins - len(tight))]
    return [[sorted(bin) for bin in rank] for rank in _deal(bins, costs, dp_size)]


def plan_pass(
    minibatches: Sequence[Sequence[int]], dp_size: int, cut: Cut, *, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Return the micro-batches of every data-parallel rank in a pass over several minibatches.

    Each is cut as its update cuts it, so a sequence is on the rank that trains on it, in the same
    micro-batch.

    Args and errors are those of `plan_micro_batches`, but for:
        minibatches: tokens of the sequences of each; positions count through all of them.
    """
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    start = 0
    for lengths in minibatches:
        planned = plan_micro_batches(lengths, dp_size, cut, multiple_of=multiple_of)
        for rank, micro_batches in zip(ranks, planned, strict=True):
            rank += [[start + position for position in bin] for bin in micro_batches]
        start += len(lengths)
    return ranks


def packing_metrics(plan: MinibatchPlan, cut: Cut) -> Metrics:
    """Return how well a plan uses its micro-batches and its ranks.

    `batch/num_micro_batches` is per rank and adds up over the minibatches of a step, as does
    `batch/tokens`. `batch/packing_frac` is the share of the token budget that tokens fill; without
    a budget, of the fullest micro-batch. `batch/dp_imbalance_frac` is the share of its time that
    the average rank waits for the busiest: 1 - mean cost / max cost.
    """
    lengths = [
        [[plan.lengths[index] for index in micro_batch] for micro_batch in rank]
        for rank in plan.micro_batches
    ]
    tokens = [sum(micro_batch) for rank in lengths for micro_batch in rank]
    room = cut.max_tokens if isinstance(cut, TokenBudget) else max(tokens)
    costs = [sum(_cost(n) for micro_batch in rank for n in micro_batch) for rank in lengths]
    busiest = max(costs)
    waiting = 1 - sum(costs) / (len(costs) * busiest) if busiest else 0.0
    return {
        "batch/num_micro_batches": metrics.total(len(lengths[0])),
        "batch/tokens": metrics.total(sum(tokens)),
        "batch/packing_frac": metrics.Metric(sum(tokens), "mean", len(tokens) * room),
        "batch/dp_imbalance_frac": metrics.mean(waiting),
    }


def _cost(num_tokens: int) -> int:
    """Return the work of one sequence in arbitrary units: a linear and an attention term."""
    return num_tokens * (_ATTENTION_TOKENS + num_tokens)


def _best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return few bins of item numbers: largest item first, each into the tightest bin with room.

    Needs at most 11/9 of the fewest possible bins, up to a constant.
    Source: Johnson et al. 1974, SIAM J. Comput. 3(4), best fit decreasing.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), sorted, of bins in which an item may fit
    smallest = min(sizes, default=0)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(free, (sizes[item], -1))
        if place == len(free):
            bins.append([item])
            room, number = capacity, len(bins) - 1
        else:
            room, number = free.pop(place)
            bins[number].append(item)
        if (left := room - sizes[item]) >= smallest:
            bisect.insort(free, (left, number))
    return bins


def _even_fit(
    costs: Sequence[int], sizes: Sequence[int], capacity: int, num_bins: int
) -> list[list[int]] | None:
    """Return `num_bins` bins of about equal cost: costliest item first, each into the cheapest bin
    with room; None if an item finds no room.

    Source: Graham 1969, SIAM J. Appl. Math. 17(2), longest processing time first.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    free = [capacity] * num_bins
    cheapest = [(0, number) for number in range(num_bins)]  # heap of (cost, bin)
    # Heap of (-room, cost, bin): bins without room for an item. The next item is no larger, so a
    # bin is set aside at most once for each item that it holds.
    aside: list[tuple[int, int, int]] = []
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        size = sizes[item]
        while aside and -aside[0][0] >= size:
            heapq.heappush(cheapest, heapq.heappop(aside)[1:])
        while cheapest and free[cheapest[0][1]] < size:
            cost, number = heapq.heappop(cheapest)
            heapq.heappush(aside, (-free[number], cost, number))
        if not cheapest:
            return None
        cost, number = cheapest[0]
        heapq.heapreplace(cheapest, (cost + costs[item], number))
        bins[number].append(item)
        free[number] -= size
    return bins


def _deal(bins: Sequence[list[int]], costs: Sequence[int], dp_size: int) -> list[list[list[int]]]:
    """Return the bins of each rank: rows of like cost, costliest first, each row's costliest to
    the rank with the least so far."""
    bin_costs = [sum(costs[item] for item in bin) for bin in bins]
    by_cost = sorted(range(len(bins)), key=lambda number: -bin_costs[number])
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for start in range(0, len(bins), dp_size):
        row = by_cost[start : start + dp_size]
        by_load = sorted(range(dp_size), key=lambda rank: loads[rank])
        for number, rank in zip(row, by_load, strict=True):
            ranks[rank].append(bins[number])
            loads[rank] += bin_costs[number]
    return ranks
