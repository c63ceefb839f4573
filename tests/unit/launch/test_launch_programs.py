"""What a launcher starts for a place of a run."""

from __future__ import annotations

import pytest

from mcore_rl.cluster.placement import engines_apart
from mcore_rl.launch.processes import loopback, network_environment, visible_devices
from mcore_rl.launch.programs import devices_beside, engine_program, worker_program
from mcore_rl.sockets import Address
from mcore_rl.types import Layout

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("own", "devices"),
    [
        ({}, [[0, 1], [2, 3]]),
        ({"own_nodes": 1, "own_devices_per_node": 4}, [[4, 5], [6, 7]]),
        ({"own_nodes": 2, "own_devices_per_node": 2}, [[4, 5], [6, 7]]),
    ],
)
def test_engines_on_the_trainers_machine_see_its_devices_or_those_behind_them(own, devices):
    placement = engines_apart(Layout(dp=4), 4, 2, **own)
    found = [list(devices_beside(placement, place)) for place in placement.engines]
    assert found == devices


def test_an_engine_on_a_machine_of_its_own_sees_the_devices_of_its_place():
    placement = engines_apart(Layout(dp=4), 4, 2, own_nodes=2, own_devices_per_node=2)
    programs = [engine_program(place, "fake") for place in placement.engines]
    assert [list(program.devices or ()) for program in programs] == [[0, 1], [0, 1]]
    assert [program.rank for program in programs] == [4, 5]


def test_devices_are_counted_among_those_that_the_user_left_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert visible_devices([1, 2]) == "6,7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_devices([1, 2]) == "1,2"


def test_a_worker_is_told_its_rank_and_its_place_on_its_node():
    placement = engines_apart(Layout(dp=6), 3, 1)
    program = worker_program(placement.places[4], placement, "fake", "", {"MASTER_ADDR": "a"})
    told = {name: program.environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    assert told == {"RANK": "4", "LOCAL_RANK": "1", "WORLD_SIZE": "6"}
    assert program.environment["LOCAL_WORLD_SIZE"] == "3"
    assert program.environment["MASTER_ADDR"] == "a"
    assert program.options["engine"] == "", "its engines are processes of their own"


def test_collectives_go_by_the_interface_on_the_way_to_the_controller(monkeypatch):
    """A host name that is 127.0.1.1 on its machine would have them hang between machines."""
    for variable in INTERFACES:
        monkeypatch.delenv(variable, raising=False)
    here = Address("ipc:///tmp/calls", b"")
    assert network_environment(here) == dict.fromkeys(INTERFACES, loopback())
    elsewhere = Address("tcp://127.0.0.1:4000", b"")
    assert network_environment(elsewhere) == dict.fromkeys(INTERFACES, loopback())
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert set(network_environment(elsewhere)) == {"GLOO_SOCKET_IFNAME"}, "the user's is kept"
