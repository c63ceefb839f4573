from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.data.prompts import ItemStream
from mcore_rl.errors import UserError
from tests.carriers import make_prompt, make_sequence


def _prompts(n):
    return [
        make_prompt(uid=f"t:{i}", token_ids=[i], text="", data_source="s", ground_truth="")
        for i in range(n)
    ]


def _uids(batch):
    return [prompt.uid for prompt in batch]


@given(
    num_items=st.integers(1, 20),
    data=st.data(),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_an_epoch_visits_each_prompt_at_most_once_and_drops_less_than_a_batch(
    num_items, data, seed, shuffle
):
    n = data.draw(st.integers(1, num_items))
    stream = ItemStream(_prompts(num_items), seed=seed, shuffle=shuffle)
    for epoch in range(3):
        visited = []
        for _ in range(stream.num_batches_per_epoch(n)):
            visited += _uids(stream.next(n))
            assert stream.epoch == epoch
        assert len(set(visited)) == len(visited) > num_items - n


@given(
    num_items=st.integers(1, 20),
    data=st.data(),
    num_before=st.integers(0, 12),
    shuffle=st.booleans(),
)
def test_a_resumed_stream_continues_exactly(num_items, data, num_before, shuffle):
    n = data.draw(st.integers(1, num_items))
    stream = ItemStream(_prompts(num_items), seed=5, shuffle=shuffle)
    for _ in range(num_before):
        stream.next(n)
    resumed = ItemStream(_prompts(num_items), seed=5, shuffle=shuffle)
    resumed.load_state_dict(stream.state_dict())
    for _ in range(8):
        assert _uids(resumed.next(n)) == _uids(stream.next(n))
        assert resumed.epoch == stream.epoch


def test_epochs_and_seeds_differ_in_order_and_unshuffled_keeps_it():
    def epochs(**options):
        stream = ItemStream(_prompts(30), **options)
        return [_uids(stream.next(30)) for _ in range(2)]

    (a0, a1), (b0, _) = epochs(seed=1), epochs(seed=2)
    assert len({tuple(a0), tuple(a1), tuple(b0)}) == 3
    assert epochs(seed=1)[0] == a0
    in_order = _uids(_prompts(30))
    assert epochs(shuffle=False) == [in_order, in_order]


def test_the_order_of_a_seed_does_not_change_between_versions():
    # A resumed run relies on it; change it only together with the checkpoint version.
    stream = ItemStream(_prompts(6), seed=0)
    assert _uids(stream.next(6)) == ["t:2", "t:3", "t:1", "t:0", "t:5", "t:4"]


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"data\.train_batch_size=4 is more than the 3 rows"):
        ItemStream(_prompts(3)).next(4)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (ItemStream(_prompts(4), seed=1), "num_items"),
        (ItemStream(_prompts(3), seed=2), "seed"),
        (ItemStream(_prompts(3), seed=1, shuffle=False), "shuffle"),
        (ItemStream(_prompts(3)[::-1], seed=1), "digest"),
        *(
            (ItemStream([replace(_prompts(1)[0], **change), *_prompts(3)[1:]], seed=1), "digest")
            for change in (
                {"token_ids": [5]},
                {"ground_truth": "2"},
                {"extra_info": {"tests": 1}},
                {"data_source": "other"},
            )
        ),
    ],
)
def test_a_state_of_other_data_is_refused(other, key):
    with pytest.raises(UserError, match=f"data {key}="):
        ItemStream(_prompts(3), seed=1).load_state_dict(other.state_dict())


def test_the_digest_is_that_of_the_content_and_not_of_its_type():
    """A checkpoint of before there was one is taken; arrays hold what lists hold."""
    stream = ItemStream(_prompts(3), seed=1)
    as_arrays = [replace(p, token_ids=np.array(p.token_ids, np.int32)) for p in _prompts(3)]
    state = stream.state_dict()
    ItemStream(as_arrays, seed=1).load_state_dict(state)
    assert len(state["digest"]) == 32
    sequences = [make_sequence(token_ids=[1, 2], loss_mask=[False, True])]
    other = [replace(sequences[0], loss_mask=[False, False])]
    digests = {ItemStream(items).state_dict()["digest"] for items in (sequences, other)}
    assert len(digests) == 2
    del state["digest"]
    stream.load_state_dict(state)
