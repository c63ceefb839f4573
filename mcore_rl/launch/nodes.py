"""The machines without the controller: a node process on each starts the other processes there.

It says hello like every process of the run, starts and kills processes on request, and reports the
state of its children with each heartbeat. They end with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mcore_rl.frames import encode
from mcore_rl.launch import channel
from mcore_rl.launch.channel import Listener
from mcore_rl.launch.processes import Ended, Program, State


@dataclass(slots=True)
class _Child:
    """A process that a node was told to start."""

    node: int
    attempt: int
    pid: int | None = None
    exit_code: int | None = None


class Nodes:
    """The node processes of a run.

    Args:
        listener: of the channel.
        ranks: rank of the node process, by number of its machine.
    """

    def __init__(self, listener: Listener, ranks: Mapping[int, int]) -> None:
        self._listener, self._ranks = listener, ranks
        self._children: dict[int, _Child] = {}

    def start(self, node: int, program: Program) -> None:
        """Ask the node to start a process; it replaces one of the same rank that has ended."""
        before = self._children.get(program.rank)
        attempt = before.attempt + 1 if before else 0
        self._children[program.rank] = _Child(node, attempt)
        frames = encode(replace(program, attempt=attempt))
        self._listener.send(self._ranks[node], channel.SPAWN, {}, frames)

    def kill_one(self, rank: int) -> None:
        """Ask the node to kill a process, before another one is started in its place."""
        node = self._children[rank].node
        self._listener.send(self._ranks[node], channel.KILL, {}, encode(rank))

    def heard(self, report: Mapping[str, Any]) -> None:
        """See `Processes`."""
        for rank, (attempt, pid, exit_code) in report.get("children", {}).items():
            child = self._children.get(int(rank))
            if child is not None and child.attempt == attempt:
                child.pid, child.exit_code = pid, exit_code

    def ended(self) -> dict[int, Ended]:
        """See `Processes`."""
        return {
            rank: Ended(child.exit_code)
            for rank, child in self._children.items()
            if child.exit_code is not None
        }

    def __contains__(self, rank: int) -> bool:
        return rank in self._children

    def state(self, rank: int) -> State:
        """See `Processes`."""
        child = self._children[rank]
        process = "not started yet on" if child.pid is None else f"process {child.pid} of"
        return State(f"{process} node {child.node}")
