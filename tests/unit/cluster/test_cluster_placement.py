"""Where engines stand that are processes of their own."""

from __future__ import annotations

from mcore_rl.cluster.placement import colocated, engines_apart, servers_apart
from mcore_rl.types import Layout

LAYOUT = Layout(tp=2, dp=4)


def test_engines_on_the_trainers_devices_are_fed_by_the_first_of_them():
    placement = engines_apart(LAYOUT, 4, engine_size=2)
    found = [(e.engine, e.rank, e.node, e.devices, e.fed_by) for e in placement.engines]
    assert found == [
        (0, 8, 0, (0, 1), 0),
        (1, 9, 0, (2, 3), 2),
        (2, 10, 1, (0, 1), 4),
        (3, 11, 1, (2, 3), 6),
    ]
    assert placement.engine_ranks == [[8], [9], [10], [11]]
    assert {place.engine for place in placement.places} == {None}
    assert placement.world_size == 8


def test_engines_on_devices_of_their_own_come_after_the_trainers_nodes():
    placement = engines_apart(LAYOUT, 4, engine_size=1, own_nodes=1, own_devices_per_node=3)
    found = [(e.engine, e.rank, e.node, e.devices, e.fed_by) for e in placement.engines]
    assert found == [(0, 8, 2, (0,), 0), (1, 9, 2, (1,), 1), (2, 10, 2, (2,), 2)]


def test_more_engines_than_workers_are_fed_in_turn():
    placement = engines_apart(Layout(dp=2), 2, engine_size=1, own_nodes=2, own_devices_per_node=2)
    assert [engine.fed_by for engine in placement.engines] == [0, 1, 0, 1]
    assert [engine.node for engine in placement.engines] == [1, 1, 2, 2]


def test_engines_inside_are_ranks_side_by_side():
    assert colocated(LAYOUT, 4, 2).engine_ranks == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_servers_have_no_devices_here_and_are_fed_from_the_first_node():
    placement = servers_apart(Layout(dp=4), 2, num_servers=3)
    assert placement.world_size == 4
    assert [(e.rank, e.node, e.devices, e.fed_by) for e in placement.engines] == [
        (4, 0, (), 0),
        (5, 0, (), 1),
        (6, 0, (), 0),
    ]
    assert placement.engine_ranks == [[4], [5], [6]]
