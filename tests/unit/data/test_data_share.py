"""What a data-parallel rank is sent: a few arrays, cut into micro-batches where they arrive."""

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.data.packing import TokenBudget, plan_minibatch
from mcore_rl.types import NUMBERS, MicroBatch, Share, TokenNumbers, TokenSequence
from tests.carriers import make_sequence

ROUTES = (2, 3)
"""MoE layers and experts per token."""


def _sequence(number, length, names=NUMBERS, with_routes=True):
    """Return a sequence whose every value is another."""
    base = 1000 * number + np.arange(length)
    routes = np.arange((length - 1) * 6, dtype=np.uint8).reshape(length - 1, *ROUTES) + number
    return TokenSequence(
        token_ids=base,
        loss_mask=base % 3 > 0,
        **{name: base + (i + 1) / 8 for i, name in enumerate(names)},
        routed_experts=routes if with_routes else None,
    )


def _travelled(share):
    """Return the share as it arrives, and the sizes of its buffers and of the rest in bytes."""
    buffers = []
    rest = pickle.dumps(share, protocol=5, buffer_callback=buffers.append)
    sizes = [buffer.raw().nbytes for buffer in buffers]
    return pickle.loads(rest, buffers=[bytes(b.raw()) for b in buffers]), sizes, len(rest)


@given(
    st.lists(st.integers(1, 9), max_size=12),
    st.integers(1, 3),
    st.booleans(),
)
def test_micro_batches_hold_the_sequences_that_were_planned_for_them(lengths, dp_size, with_routes):
    sequences = [
        _sequence(number, length, with_routes=with_routes) for number, length in enumerate(lengths)
    ]
    plan = plan_minibatch(sequences, dp_size, TokenBudget(max_tokens=12))
    for planned in plan.micro_batches:
        share, _, _ = _travelled(Share.of(sequences, planned))
        assert len(share) == len(planned)
        for micro_batch, indices in zip(share, planned, strict=True):
            assert micro_batch.indices.tolist() == list(indices)
            assert micro_batch.lengths.tolist() == [lengths[i] for i in indices]
            starts = np.cumsum(micro_batch.lengths) - micro_batch.lengths
            for place, (index, start) in enumerate(zip(indices, starts.tolist(), strict=True)):
                sequence: Any = sequences[index]
                stop = start + lengths[index]
                for name in ("token_ids", "loss_mask", *NUMBERS):
                    found = getattr(micro_batch, name)[start:stop]
                    assert np.array_equal(found, getattr(sequence, name)), name
                if with_routes:
                    found = micro_batch.routed_experts[start - place : stop - place - 1]
                    assert np.array_equal(found, sequence.routed_experts)


def test_an_update_travels_in_a_handful_of_buffers_of_at_most_30_bytes_a_token():
    names = ("rollout_logprobs", "advantages", "old_logprobs", "ref_logprobs")
    sequences = [_sequence(n % 7, 500, names, with_routes=False) for n in range(200)]
    plan = plan_minibatch(sequences, 1, TokenBudget(max_tokens=2000))
    share, sizes, rest = _travelled(Share.of(sequences, plan.micro_batches[0]))
    assert len(share) == 50
    assert len(sizes) <= 10
    assert sum(sizes) + rest <= 22 * 500 * 200  # 4 + 1 + 4 * 4, and the lengths


def test_a_pass_that_reads_no_numbers_travels_without_them():
    sequences = [_sequence(n % 7, 500) for n in range(200)]
    plan = plan_minibatch(sequences, 1, TokenBudget(max_tokens=2000))
    share, sizes, rest = _travelled(Share.of(sequences, plan.micro_batches[0], reads=()))
    assert all(getattr(share[0], name) is None for name in (*NUMBERS, "routed_experts"))
    assert sum(sizes) + rest <= 5.2 * 500 * 200  # ids and mask


def test_a_micro_batch_of_a_share_is_cut_without_copying():
    share = Share.of([_sequence(0, 4), _sequence(1, 3)], [[1], [0]])
    assert np.shares_memory(share[0].token_ids, share.whole.token_ids)
    assert np.shares_memory(share[1].routed_experts, share.whole.routed_experts)
    with pytest.raises(IndexError):
        share[2]


def test_a_share_without_sequences_has_micro_batches_all_the_same():
    share, _, _ = _travelled(Share.of([], [[], []]))
    assert [len(micro_batch.lengths) for micro_batch in share] == [0, 0]
    assert share[1].token_ids.dtype == np.int32


def test_numbers_come_back_by_the_place_of_their_sequence():
    numbers = np.array([0, 1, 2, 0, 5], np.float32)
    found = TokenNumbers(
        indices=np.array([4, 1], np.int32), lengths=np.array([3, 2], np.int32), numbers=numbers
    )
    assert {i: x.tolist() for i, x in found.by_index()} == {4: [0, 1, 2], 1: [0, 5]}


def test_carriers_make_arrays_of_lists_and_refuse_another_length():
    sequence = make_sequence(token_ids=[7, 8], loss_mask=[False, True], advantages=[0, 0.1])
    assert sequence.token_ids.dtype == np.int32
    assert sequence.loss_mask.dtype == np.bool_
    assert sequence.advantages is not None
    assert sequence.advantages.dtype == np.float32
    packed = MicroBatch.of([sequence]).advantages
    assert packed is not None
    assert packed.tolist() == [0.0, np.float32(0.1)]
    with pytest.raises(AssertionError, match="loss_mask is not as long as token_ids"):
        make_sequence(token_ids=[7, 8], loss_mask=[True])
