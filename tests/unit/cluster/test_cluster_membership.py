"""Which engines take requests, through any order of failures and starts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.cluster.membership import Membership


@given(
    num_engines=st.integers(1, 4),
    max_restarts=st.integers(0, 5),
    events=st.lists(st.tuples(st.sampled_from(["lose", "join"]), st.integers(0, 3)), max_size=30),
)
def test_an_engine_is_a_member_or_starts_again_and_starts_are_counted(
    num_engines, max_restarts, events
):
    fleet = Membership(num_engines, max_restarts)
    num_lost, starts = 0, [[fleet.start_of(engine)] for engine in range(num_engines)]
    for kind, engine in events:
        engine %= num_engines
        members = fleet.members
        if kind == "lose":
            is_started = fleet.lose(engine)
            assert is_started == (num_lost < max_restarts)
            if not is_started:
                assert fleet.members == members
                continue
            num_lost += 1
            assert engine in fleet.starting
            starts[engine].append(fleet.start_of(engine))
        elif engine in fleet.starting:
            fleet.join(engine)
        assert sorted([*fleet.members, *fleet.starting]) == list(range(num_engines))
        for earlier in starts[engine][:-1]:
            assert not fleet.is_member(earlier), "what it was given then is lost"
        assert fleet.is_member(starts[engine][-1]) == (engine in fleet.members)
    assert (fleet.num_restarts, fleet.num_restarts_left) == (num_lost, max_restarts - num_lost)
    for of_engine in starts:
        assert len(set(of_engine)) == len(of_engine)
