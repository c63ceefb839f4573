import heapq
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.data import packing
from mcore_rl.data.packing import (
    SequenceCount,
    TokenBudget,
    packing_metrics,
    plan_micro_batches,
    plan_minibatch,
    plan_pass,
    split_minibatches,
)
from mcore_rl.errors import UserError
from mcore_rl.metrics import merge, to_floats
from mcore_rl.types import Denominators, SampleGroup
from tests.carriers import make_prompt, make_sequence


def _sequence(length, num_trained=None):
    num_trained = length - 1 if num_trained is None else num_trained
    return make_sequence(
        token_ids=list(range(length)),
        loss_mask=[False] * (length - num_trained) + [True] * num_trained,
    )


def _lengths(rank, lengths):
    return [[lengths[index] for index in micro_batch] for micro_batch in rank]


lengths = st.lists(st.integers(1, 40), max_size=30)
cuts = st.one_of(
    st.builds(TokenBudget, max_tokens=st.integers(40, 120)),
    st.builds(SequenceCount, num_sequences=st.integers(1, 6)),
)
dp_sizes = st.integers(1, 5)
multiples = st.integers(1, 4)


@given(lengths, dp_sizes, cuts, multiples)
def test_every_sequence_is_in_exactly_one_micro_batch(lengths, dp_size, cut, multiple_of):
    ranks = plan_micro_batches(lengths, dp_size, cut, multiple_of=multiple_of)
    micro_batches = [micro_batch for rank in ranks for micro_batch in rank]
    indices = [i for micro_batch in micro_batches for i in micro_batch]
    assert sorted(indices) == list(range(len(lengths)))
    assert all(micro_batch == sorted(micro_batch) for micro_batch in micro_batches)


@given(lengths, dp_sizes, cuts, multiples)
def test_every_rank_has_the_same_multiple_of_micro_batches(lengths, dp_size, cut, multiple_of):
    ranks = plan_micro_batches(lengths, dp_size, cut, multiple_of=multiple_of)
    assert len(ranks) == dp_size
    (count,) = {len(rank) for rank in ranks}
    assert count >= 1
    assert count % multiple_of == 0


@given(st.lists(lengths, min_size=1, max_size=4), dp_sizes, cuts, multiples)
def test_a_pass_over_minibatches_has_the_micro_batches_of_their_updates(
    minibatches, dp_size, cut, multiple_of
):
    numbers = iter(range(1000))
    numbered = [[next(numbers) for _ in minibatch] for minibatch in minibatches]
    expected = [[] for _ in range(dp_size)]
    for of_minibatch, lengths in zip(numbered, minibatches, strict=True):
        planned = plan_micro_batches(lengths, dp_size, cut, multiple_of=multiple_of)
        for rank, micro_batches in enumerate(planned):
            expected[rank] += _lengths(micro_batches, of_minibatch)
    assert plan_pass(minibatches, dp_size, cut, multiple_of=multiple_of) == expected


@given(lengths, dp_sizes, st.integers(40, 120))
def test_no_micro_batch_exceeds_the_token_budget(lengths, dp_size, budget):
    ranks = plan_micro_batches(lengths, dp_size, TokenBudget(max_tokens=budget))
    assert all(
        sum(micro_batch) <= budget for rank in ranks for micro_batch in _lengths(rank, lengths)
    )


@given(lengths, dp_sizes, st.integers(1, 6))
def test_a_sequence_count_is_kept_with_the_fewest_micro_batches(lengths, dp_size, count):
    cut = SequenceCount(num_sequences=count)
    ranks = plan_micro_batches(lengths, dp_size, cut)
    assert all(
        len(micro_batch) <= count for rank in ranks for micro_batch in _lengths(rank, lengths)
    )
    assert len(ranks[0]) == max(1, -(-len(lengths) // (count * dp_size)))


@given(lengths, dp_sizes, st.integers(40, 120))
def test_a_token_budget_needs_less_than_twice_the_fewest_micro_batches(lengths, dp_size, budget):
    ranks = plan_micro_batches(lengths, dp_size, TokenBudget(max_tokens=budget))
    # Two bins of a best-fit packing that are each at most half full cannot both exist.
    num_packed = 2 * sum(lengths) / budget + 1
    assert len(ranks[0]) <= max(1, -(-num_packed // dp_size))


@given(lengths, dp_sizes, cuts)
def test_the_same_input_gives_the_same_plan(lengths, dp_size, cut):
    assert plan_micro_batches(lengths, dp_size, cut) == plan_micro_batches(lengths, dp_size, cut)


@given(
    st.lists(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))),
    dp_sizes,
    cuts,
)
def test_denominators_count_the_whole_minibatch_whatever_the_cut(shapes, dp_size, cut):
    plan = plan_minibatch([_sequence(*shape) for shape in shapes], dp_size, cut)
    # The first token is never predicted, so it does not count even where its mask is True.
    trained = [min(num_trained, length - 1) for length, num_trained in shapes]
    assert plan.denominators == Denominators(
        num_tokens=sum(trained), num_sequences=sum(n > 0 for n in trained)
    )


def test_the_worked_example_of_the_module():
    lengths = [6, 5, 4, 3, 2]
    ranks = plan_micro_batches(lengths, 2, TokenBudget(max_tokens=8))
    assert [_lengths(rank, lengths) for rank in ranks] == [[[6], [4]], [[5], [3, 2]]]
    assert ranks == [[[0], [2]], [[1], [3, 4]]]


def test_ranks_are_balanced_by_cost_not_by_position():
    # Cut in order, the first rank would get all the long ones.
    lengths = [4000] * 8 + [500] * 56
    ranks = plan_micro_batches(lengths, 8, TokenBudget(max_tokens=8192))
    flat = [sorted(itertools.chain(*_lengths(rank, lengths))) for rank in ranks]
    assert flat == [[*[500] * 7, 4000]] * 8


def test_ranks_of_a_skewed_minibatch_wait_for_less_than_one_percent():
    # 512 log-normal lengths, median 665, the longest 8192; observed 0.02 percent.
    random_ = random.Random(0)
    sequences = [
        _sequence(min(8192, 50 + int(random_.lognormvariate(6.5, 0.9)))) for _ in range(512)
    ]
    cut = TokenBudget(max_tokens=16384)
    numbers = to_floats(packing_metrics(plan_minibatch(sequences, 8, cut), cut))
    assert numbers["batch/dp_imbalance_frac"] < 0.01


def test_attention_makes_one_long_sequence_cost_more_than_as_many_tokens_in_short_ones():
    lengths = [8192, *[1024] * 9]
    ranks = plan_micro_batches(lengths, 2, TokenBudget(max_tokens=10_000))
    assert sorted(sum(map(sum, _lengths(rank, lengths))) for rank in ranks) == [8192, 9216]


def test_micro_batches_that_run_together_cost_about_the_same():
    lengths = [900, 800, 200, 100]
    ranks = plan_micro_batches(lengths, 2, SequenceCount(num_sequences=1))
    assert [_lengths(rank, lengths) for rank in ranks] == [[[900], [100]], [[800], [200]]]


def test_a_sequence_longer_than_the_budget_is_refused():
    with pytest.raises(UserError, match=r"actor\.ppo_max_token_len_per_gpu=8 .* 9 tokens"):
        plan_micro_batches([9], 1, TokenBudget(max_tokens=8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenBudget(max_tokens=0, key="ref.budget"), r"ref\.budget=0 must be > 0"),
        (lambda: SequenceCount(num_sequences=0), r"actor\.ppo_micro_batch_size_per_gpu=0"),
    ],
)
def test_an_empty_cut_is_refused_by_its_key(make, message):
    with pytest.raises(UserError, match=message):
        make()


def _groups(n):
    prompt = make_prompt(uid="t:0", token_ids=[1], text="", data_source="s", ground_truth="")
    return [SampleGroup(prompt=prompt, samples=[]) for _ in range(n)]


def test_minibatches_take_the_groups_in_order():
    groups = _groups(6)
    assert split_minibatches(groups, 2) == [groups[0:2], groups[2:4], groups[4:6]]


@pytest.mark.parametrize("size", [0, 4, 12])
def test_a_minibatch_size_that_does_not_divide_is_refused(size):
    with pytest.raises(UserError, match=rf"actor\.ppo_mini_batch_size={size} .* 6 prompts"):
        split_minibatches(_groups(6), size)


def test_metrics_of_the_worked_example():
    cut = TokenBudget(max_tokens=8)
    plan = plan_minibatch([_sequence(n) for n in (6, 5, 4, 3, 2)], 2, cut)
    numbers = to_floats(packing_metrics(plan, cut))
    assert numbers["batch/num_micro_batches"] == 2
    assert numbers["batch/tokens"] == 20
    assert numbers["batch/packing_frac"] == 20 / (4 * 8)
    # Equal tokens; only the tiny attention term differs.
    assert 0 <= numbers["batch/dp_imbalance_frac"] < 1e-4


def test_metrics_of_idle_ranks_and_of_several_minibatches():
    cut = SequenceCount(num_sequences=1)
    one = packing_metrics(plan_minibatch([_sequence(6)], 4, cut), cut)
    numbers = to_floats(one)
    assert numbers["batch/dp_imbalance_frac"] == 3 / 4
    assert numbers["batch/packing_frac"] == 1 / 4
    full = packing_metrics(plan_minibatch([_sequence(6)] * 4, 4, cut), cut)
    both = to_floats(merge([one, full]))
    assert both["batch/packing_frac"] == 5 / 8
    assert both["batch/num_micro_batches"] == 2
    assert both["batch/tokens"] == 30
    assert both["batch/dp_imbalance_frac"] == 3 / 8


def test_metrics_of_an_empty_minibatch_leave_out_the_undefined():
    cut = SequenceCount(num_sequences=1)
    numbers = to_floats(packing_metrics(plan_minibatch([], 2, cut), cut))
    assert numbers == {
        "batch/num_micro_batches": 1,
        "batch/tokens": 0,
        "batch/dp_imbalance_frac": 0,
    }


@given(lengths, st.integers(1, 8), st.integers(40, 120))
def test_bins_are_filled_as_if_the_cheapest_with_room_were_sought_among_all(
    lengths, num_bins, budget
):
    costs = [packing._cost(n) for n in lengths]
    bins, is_placed = [[] for _ in range(num_bins)], True
    for item in sorted(range(len(lengths)), key=lambda i: -costs[i]):
        with_room = [b for b in bins if sum(lengths[i] for i in b) + lengths[item] <= budget]
        is_placed &= bool(with_room)
        if with_room:
            min(with_room, key=lambda b: sum(costs[i] for i in b)).append(item)
    assert packing._even_fit(costs, lengths, budget, num_bins) == (bins if is_placed else None)


def test_the_work_of_planning_grows_with_the_sequences_and_not_with_their_square(monkeypatch):
    """Long sequences leave room in costly bins, short ones fill cheap bins to the brim: every item
    would pass over all of these."""
    num_moves = 0

    def counted(move):
        def wrapped(*args):
            nonlocal num_moves
            num_moves += 1
            return move(*args)

        return wrapped

    for name in ("heappush", "heappop", "heapreplace"):
        monkeypatch.setattr(packing.heapq, name, counted(getattr(heapq, name)))
    random_ = random.Random(0)
    num_sequences = 4000
    lengths = [
        (60_000 if random_.random() < 0.15 else 2000) + random_.randint(0, 100)
        for _ in range(num_sequences)
    ]
    plan_micro_batches(lengths, 8, TokenBudget(max_tokens=65_536))
    # One to place an item; a bin is set aside and taken back at most once for each that it holds.
    assert num_moves <= 5 * num_sequences
