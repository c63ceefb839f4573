import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.data.packing import (
    SequenceCount,
    TokenBudget,
    packing_metrics,
    plan_micro_batches,
    plan_minibatch,
    split_minibatches,
)
from mcore_rl.errors import UserError
from mcore_rl.metrics import merge, to_floats
from mcore_rl.types import Denominators, Prompt, SampleGroup, TokenSequence


def _sequence(length, num_trained=None):
    num_trained = length - 1 if num_trained is None else num_trained
    return TokenSequence(
        token_ids=list(range(length)),
        loss_mask=[False] * (length - num_trained) + [True] * num_trained,
    )


def _lengths(rank):
    return [[len(s.token_ids) for s in micro_batch.sequences] for micro_batch in rank]


lengths = st.lists(st.integers(1, 40), max_size=30)
cuts = st.one_of(
    st.builds(TokenBudget, max_tokens=st.integers(40, 120)),
    st.builds(SequenceCount, num_sequences=st.integers(1, 6)),
)
dp_sizes = st.integers(1, 5)
multiples = st.integers(1, 4)


@given(lengths, dp_sizes, cuts, multiples)
def test_every_sequence_is_in_exactly_one_micro_batch(lengths, dp_size, cut, multiple_of):
    sequences = [_sequence(n) for n in lengths]
    ranks = plan_micro_batches(sequences, dp_size, cut, multiple_of=multiple_of)
    micro_batches = [micro_batch for rank in ranks for micro_batch in rank]
    indices = [i for micro_batch in micro_batches for i in micro_batch.indices]
    assert sorted(indices) == list(range(len(sequences)))
    for micro_batch in micro_batches:
        assert len(micro_batch.sequences) == len(micro_batch.indices)
        for i, sequence in zip(micro_batch.indices, micro_batch.sequences, strict=True):
            assert sequence is sequences[i]


@given(lengths, dp_sizes, cuts, multiples)
def test_every_rank_has_the_same_multiple_of_micro_batches(lengths, dp_size, cut, multiple_of):
    sequences = [_sequence(n) for n in lengths]
    ranks = plan_micro_batches(sequences, dp_size, cut, multiple_of=multiple_of)
    assert len(ranks) == dp_size
    (count,) = {len(rank) for rank in ranks}
    assert count >= 1
    assert count % multiple_of == 0


@given(lengths, dp_sizes, st.integers(40, 120))
def test_no_micro_batch_exceeds_the_token_budget(lengths, dp_size, budget):
    ranks = plan_micro_batches(
        [_sequence(n) for n in lengths], dp_size, TokenBudget(max_tokens=budget)
    )
    assert all(sum(micro_batch) <= budget for rank in ranks for micro_batch in _lengths(rank))


@given(lengths, dp_sizes, st.integers(1, 6))
def test_a_sequence_count_is_kept_with_the_fewest_micro_batches(lengths, dp_size, count):
    cut = SequenceCount(num_sequences=count)
    ranks = plan_micro_batches([_sequence(n) for n in lengths], dp_size, cut)
    assert all(len(micro_batch) <= count for rank in ranks for micro_batch in _lengths(rank))
    assert len(ranks[0]) == max(1, -(-len(lengths) // (count * dp_size)))


@given(lengths, dp_sizes, st.integers(40, 120))
def test_a_token_budget_needs_less_than_twice_the_fewest_micro_batches(lengths, dp_size, budget):
    ranks = plan_micro_batches(
        [_sequence(n) for n in lengths], dp_size, TokenBudget(max_tokens=budget)
    )
    # Two bins of a best-fit packing that are each at most half full cannot both exist.
    num_packed = 2 * sum(lengths) / budget + 1
    assert len(ranks[0]) <= max(1, -(-num_packed // dp_size))


@given(lengths, dp_sizes, cuts)
def test_the_same_input_gives_the_same_plan(lengths, dp_size, cut):
    sequences = [_sequence(n) for n in lengths]
    assert plan_micro_batches(sequences, dp_size, cut) == plan_micro_batches(
        sequences, dp_size, cut
    )


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
    sequences = [_sequence(n) for n in (6, 5, 4, 3, 2)]
    ranks = plan_micro_batches(sequences, 2, TokenBudget(max_tokens=8))
    assert [_lengths(rank) for rank in ranks] == [[[6], [4]], [[5], [3, 2]]]
    assert [[list(m.indices) for m in rank] for rank in ranks] == [[[0], [2]], [[1], [3, 4]]]


def test_ranks_are_balanced_by_cost_not_by_position():
    # Cut in order, the first rank would get all the long ones.
    sequences = [_sequence(n) for n in [4000] * 8 + [500] * 56]
    ranks = plan_micro_batches(sequences, 8, TokenBudget(max_tokens=8192))
    flat = [sorted(itertools.chain(*_lengths(rank))) for rank in ranks]
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
    sequences = [_sequence(n) for n in [8192, *[1024] * 9]]
    ranks = plan_micro_batches(sequences, 2, TokenBudget(max_tokens=10_000))
    assert sorted(sum(map(sum, _lengths(rank))) for rank in ranks) == [8192, 9216]


def test_micro_batches_that_run_together_cost_about_the_same():
    sequences = [_sequence(n) for n in (900, 800, 200, 100)]
    ranks = plan_micro_batches(sequences, 2, SequenceCount(num_sequences=1))
    assert [_lengths(rank) for rank in ranks] == [[[900], [100]], [[800], [200]]]


def test_a_sequence_longer_than_the_budget_is_refused():
    with pytest.raises(UserError, match=r"actor\.ppo_max_token_len_per_gpu=8 .* 9 tokens"):
        plan_micro_batches([_sequence(9)], 1, TokenBudget(max_tokens=8))


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
    prompt = Prompt(uid="t:0", token_ids=[1], text="", data_source="s", ground_truth="")
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
