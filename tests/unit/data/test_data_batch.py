import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.data.batch import pack, unpack
from mcore_rl.types import MicroBatch
from tests.carriers import make_sequence

VALUES = ("rollout_logprobs", "advantages", "old_logprobs", "ref_logprobs")


def _micro_batch(*sequences):
    return MicroBatch.of(sequences)


def _sequence(token_ids, loss_mask, **values):
    return make_sequence(
        token_ids=token_ids, loss_mask=[bool(trains) for trains in loss_mask], **values
    )


def _pack(micro_batch, **options):
    return pack(micro_batch, pad_token_id=0, device="cpu", **options)


def test_three_tokens_become_two_positions_aligned_to_the_token_they_predict():
    sequence = _sequence(
        [7, 8, 9], [0, 1, 1], old_logprobs=[0.0, -1.5, -2.5], advantages=[0.0, 0.5, -0.5]
    )
    batch = _pack(_micro_batch(sequence))
    assert batch.input_ids_T.tolist() == [7, 8]
    assert batch.labels_T.tolist() == [8, 9]
    assert batch.mask_T.tolist() == [True, True]
    assert batch.old_logprobs_T is not None
    assert batch.old_logprobs_T.tolist() == [-1.5, -2.5]
    assert batch.advantages_T is not None
    assert batch.advantages_T.tolist() == [0.5, -0.5]
    assert batch.ref_logprobs_T is None
    assert batch.rollout_logprobs_T is None


def test_the_worked_example_of_the_module():
    batch = _pack(
        _micro_batch(_sequence([7, 8, 9], [0, 1, 1]), _sequence([5, 6], [0, 1])), align_sequence=2
    )
    assert batch.input_ids_T.tolist() == [7, 8, 5, 0]
    assert batch.labels_T.tolist() == [8, 9, 6, 0]
    assert batch.position_ids_T.tolist() == [0, 1, 0, 1]
    assert batch.segments.sequence_T.tolist() == [0, 0, 1, 1]
    assert batch.mask_T.tolist() == [True, True, True, False]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.cu_seqlens_padded.tolist() == [0, 2, 4]
    assert batch.segments.num_tokens_S.tolist() == [2, 1]
    assert batch.max_seqlen == 2
    assert batch.lengths == (3, 2)


def test_routes_belong_to_inputs_and_padding_has_none():
    first, second = (np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2) for n in (2, 1))
    batch = _pack(
        _micro_batch(
            _sequence([7, 8, 9], [0, 1, 1], routed_experts=first),
            _sequence([5, 6], [0, 1], routed_experts=second),
        ),
        align_sequence=2,
    )
    routes = batch.routed_experts_TLK
    assert routes is not None and routes.dtype == torch.int16
    assert routes.tolist() == [*first.tolist(), *second.tolist(), [[-1, -1], [-1, -1]]]


def test_a_mask_on_the_first_token_has_no_prediction_to_train():
    batch = _pack(_micro_batch(_sequence([7, 8], [1, 1])))
    assert batch.mask_T.tolist() == [True]
    assert batch.segments.num_tokens_S.tolist() == [1]


def test_dtypes_are_those_the_losses_and_attention_expect():
    batch = _pack(_micro_batch(_sequence([7, 8], [0, 1], advantages=[0.0, 1.0])))
    dtypes = {
        field.name: getattr(part, field.name).dtype
        for part in (batch, batch.segments)
        for field in dataclasses.fields(part)
        if isinstance(getattr(part, field.name), torch.Tensor)
    }
    assert dtypes == {
        "input_ids_T": torch.int64,
        "labels_T": torch.int64,
        "position_ids_T": torch.int64,
        "sequence_T": torch.int64,
        "mask_T": torch.bool,
        "num_tokens_S": torch.float32,
        "cu_seqlens": torch.int32,
        "cu_seqlens_padded": torch.int32,
        "advantages_T": torch.float32,
    }


@pytest.mark.parametrize("align_sequence", [1, 4])
@pytest.mark.parametrize("align_total", [1, 6])
def test_an_empty_micro_batch_is_one_untrained_sequence_with_every_value(
    align_sequence, align_total
):
    batch = _pack(_micro_batch(), align_sequence=align_sequence, align_total=align_total)
    size = math.lcm(align_sequence, align_total)
    assert batch.input_ids_T.tolist() == [0] * size
    assert batch.labels_T.tolist() == [0] * size
    assert batch.segments.sequence_T.tolist() == [0] * size
    assert not batch.mask_T.any()
    assert batch.segments.num_tokens_S.tolist() == [0]
    assert batch.cu_seqlens_padded.tolist() == [0, size]
    for name in VALUES:
        assert getattr(batch, f"{name}_T").tolist() == [0.0] * size
    assert unpack(torch.ones(size), batch).tolist() == []


@st.composite
def micro_batches(draw):
    shapes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    carried = draw(st.sets(st.sampled_from(VALUES)))
    sequences = []
    for number, length in enumerate(shapes):
        mask = [False, *draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))]
        # Exact in float32 and different at every token, so that a shift by one shows.
        numbers = [float(100 * number + i) * trains for i, trains in enumerate(mask)]
        token_ids = [10 * number + i + 1 for i in range(length)]
        sequences.append(_sequence(token_ids, mask, **dict.fromkeys(carried, numbers)))
    return _micro_batch(*sequences)


alignments = st.sampled_from([1, 2, 3, 4, 8])


@given(micro_batches(), alignments, alignments)
def test_unpack_is_the_inverse_of_pack(micro_batch, align_sequence, align_total):
    batch = _pack(micro_batch, align_sequence=align_sequence, align_total=align_total)
    for name in VALUES:
        values_T = getattr(batch, f"{name}_T")
        if values_T is None:
            assert getattr(micro_batch, name) is None
        else:
            assert unpack(values_T, batch).tolist() == getattr(micro_batch, name).tolist()


@given(micro_batches(), alignments, alignments)
def test_rows_are_aligned_and_padding_is_inert(micro_batch, align_sequence, align_total):
    batch = _pack(micro_batch, align_sequence=align_sequence, align_total=align_total)
    starts = batch.cu_seqlens_padded.tolist()
    assert starts[-1] == len(batch.input_ids_T)
    assert starts[-1] % align_total == 0
    assert all(start % align_sequence == 0 for start in starts)
    padded = torch.tensor(starts).diff()
    assert batch.max_seqlen == padded.max()
    real = batch.cu_seqlens.diff().tolist()
    assert real == (micro_batch.lengths - 1).tolist()
    for number, (start, end) in enumerate(itertools.pairwise(starts)):
        tokens = micro_batch.cut(number, number + 1).token_ids.tolist()
        padding = [0] * (end - start - real[number])
        assert batch.input_ids_T[start:end].tolist() == tokens[:-1] + padding
        assert batch.labels_T[start:end].tolist() == tokens[1:] + padding
        assert batch.position_ids_T[start:end].tolist() == list(range(end - start))
        assert set(batch.segments.sequence_T[start:end].tolist()) == {number}
        assert not batch.mask_T[start + real[number] : end].any()
    trained = torch.zeros(len(real)).index_add(0, batch.segments.sequence_T, batch.mask_T.float())
    assert trained.tolist() == batch.segments.num_tokens_S.tolist()


@given(micro_batches())
def test_no_sequence_gets_more_padding_than_alignment_needs(micro_batch):
    batch = _pack(micro_batch, align_sequence=4, align_total=8)
    padding = (batch.cu_seqlens_padded - batch.cu_seqlens).diff().tolist()
    assert all(p <= 4 for p in padding[:-1])  # 4 only for a sequence of one token
    assert padding[-1] <= 4 + 4


def test_values_of_untrained_positions_do_not_come_back():
    batch = _pack(_micro_batch(_sequence([7, 8, 9], [0, 0, 1])), align_total=4)
    values_T = torch.tensor([math.nan, -3.0, math.inf, math.nan], requires_grad=True)
    assert unpack(values_T, batch).tolist() == [0.0, 0.0, -3.0]


def test_a_value_that_only_some_sequences_carry_is_a_bug():
    sequences = _sequence([7, 8], [0, 1], advantages=[0.0, 1.0]), _sequence([7, 8], [0, 1])
    with pytest.raises(AssertionError, match="carry advantages"):
        _micro_batch(*sequences)


def test_a_value_of_another_length_is_a_bug():
    with pytest.raises(AssertionError, match="not as long as token_ids"):
        _sequence([7, 8], [0, 1], advantages=[0.0, 1.0, 2.0])
