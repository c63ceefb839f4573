"""Machines where the controller is not, as it reaches them: by a process there that starts others.

It says hello like every process of the run, starts and kills what it is told to, and tells with
each heartbeat how its children are. They end with it.
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
        ranks: by number of a machine: the rank of its node process.
    """

    def __init__(self, listener: Listener, ranks: Mapping[int, int]) -> None:
        self._listener, self._ranks = listener, ranks
        self._children: dict[int, _Child] = {}

    def start(self, node: int, program: Program) -> None:
        """Have a process started, in place of one of its rank that has ended."""
        before = self._children.get(program.rank)
        attempt = before.attempt + 1 if before else 0
        self._children[program.rank] = _Child(node, attempt)
        frames = encode(replace(program, attempt=attempt))
        self._listener.send(self._ranks[node], channel.SPAWN, {}, frames)

    def kill_one(self, rank: int) -> None:
        """Have a process killed, before another one is started there."""
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
