"""Processes of other machines, as the controller knows them by the heartbeats of node processes."""

from __future__ import annotations

from typing import Any

from mcore_rl.frames import decode
from mcore_rl.launch import channel, engine_process
from mcore_rl.launch.nodes import Nodes
from mcore_rl.launch.processes import Ended, Program


class Sent:
    """A listener that writes down what is sent."""

    def __init__(self):
        self.messages: list[tuple[int, bytes, Any]] = []

    def send(self, rank, kind, header, frames=()):
        self.messages.append((rank, kind, decode(frames)))


def program(rank: int) -> Program:
    return Program(rank=rank, main=engine_process.main)


def test_a_process_is_started_by_the_node_process_of_its_machine():
    sent: Any = Sent()
    nodes = Nodes(sent, {0: 10, 3: 11})
    nodes.start(3, program(7))
    assert sent.messages == [(11, channel.SPAWN, program(7))]
    assert 7 in nodes
    assert 8 not in nodes
    assert nodes.state(7).text == "not started yet on node 3"


def test_heartbeats_say_how_a_process_ended():
    nodes = Nodes(Sent(), {0: 10})  # pyright: ignore[reportArgumentType]
    nodes.start(0, program(7))
    nodes.heard({"ticks": 3, "children": {"7": [0, 4711, None]}})
    assert nodes.ended() == {}
    assert nodes.state(7).text == "process 4711 of node 0"
    nodes.heard({"ticks": 4, "children": {"7": [0, 4711, -9]}})
    assert nodes.ended() == {7: Ended(-9)}


def test_the_end_of_an_earlier_process_is_not_taken_for_that_of_the_next():
    sent: Any = Sent()
    nodes = Nodes(sent, {0: 10})
    nodes.start(0, program(7))
    nodes.kill_one(7)
    nodes.start(0, program(7))
    assert [kind for _, kind, _ in sent.messages] == [channel.SPAWN, channel.KILL, channel.SPAWN]
    assert sent.messages[1][2] == 7
    nodes.heard({"children": {"7": [0, 4711, -9]}})  # was on its way
    assert nodes.ended() == {}
    nodes.heard({"children": {"7": [1, 4712, 1]}})
    assert nodes.ended() == {7: Ended(1)}


def test_heartbeats_of_workers_name_no_children():
    nodes = Nodes(Sent(), {0: 10})  # pyright: ignore[reportArgumentType]
    nodes.heard({"ticks": 3})
    assert nodes.ended() == {}
