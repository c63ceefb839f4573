"""Whatever the order of events, no sample is drawn with weights older than the bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.loop.buffer import Buffer


@settings(max_examples=200)
@given(
    start=st.integers(0, 5),
    num_steps=st.integers(1, 12),
    max_staleness=st.integers(0, 4),
    choices=st.lists(st.booleans(), min_size=200, max_size=200),
)
def test_samples_are_at_most_as_old_as_allowed_and_none_is_lost(
    start, num_steps, max_staleness, choices
):
    """Admissions come when they like; each event notes the version that the engines have."""
    buffer: Buffer[int] = Buffer(start, start + num_steps, max_staleness)
    admitted_at, trained, version = {}, [], start
    choose = iter(choices)
    while version < start + num_steps:
        if (step := buffer.to_admit) is not None and (version not in admitted_at or next(choose)):
            buffer.admit(step)
            admitted_at[step] = version
        elif version in admitted_at:
            assert len(buffer.works) <= max_staleness + 1
            assert buffer.works[0] == buffer.take(version) == version
            trained.append(version)
            version += 1
            buffer.published(version)
    assert trained == list(range(start, start + num_steps)) == sorted(admitted_at)
    ages = [step - drawn_with for step, drawn_with in admitted_at.items()]
    assert 0 <= min(ages) <= max(ages) <= max_staleness
    assert (buffer.to_admit, buffer.works) == (None, [])


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_a_buffer_that_is_filled_works_as_far_ahead_as_it_may(max_staleness):
    buffer: Buffer[str] = Buffer(7, 100, max_staleness)
    for step in range(7, 20):
        while buffer.to_admit is not None:
            buffer.admit(f"work of {buffer.to_admit}")
        assert buffer.works == [f"work of {step + i}" for i in range(max_staleness + 1)]
        assert buffer.take(step) == f"work of {step}"
        assert buffer.to_admit is None  # its slot is free when its weights are published
        buffer.published(step + 1)
        assert buffer.to_admit == step + 1 + max_staleness


def test_what_would_break_the_bound_is_refused():
    buffer: Buffer[str] = Buffer(0, 9, 1)
    buffer.admit("a")
    with pytest.raises(AssertionError, match="step 0 trained on nothing"):
        buffer.published(1)
    buffer.admit("b")
    with pytest.raises(AssertionError, match="no step may be admitted"):
        buffer.admit("c")
    with pytest.raises(AssertionError, match="step 1 does not follow weights 0"):
        buffer.take(1)
    with pytest.raises(AssertionError, match="weights 2 after 0"):
        buffer.published(2)
