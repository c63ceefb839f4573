"""`python -m mcore_rl.launch.node_process`: runs on each machine without the controller.

It starts the processes of its machine when the controller asks for them, and ends with the run: see
`launch/nodes.py`.
"""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from mcore_rl.launch import channel
from mcore_rl.launch.channel import WorkerEnd
from mcore_rl.launch.processes import Children, started_child
from mcore_rl.observability.log_setup import setup_logging
from mcore_rl.sockets import Address

END_LIMIT_S = 120.0
"""Seconds for the processes of this machine to end in order."""


def main() -> None:
    """Entry point of a node process beside a worker that torchrun started."""
    address, arguments = started_child()
    serve_node(address, arguments.rank)


def serve_node(address: Address, rank: int) -> NoReturn:
    """Start and kill processes of this machine until the controller ends the run. Call it in the
    main thread: the processes end with that thread.

    Args:
        address: of the controller.
        rank: under which the controller reaches this process.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    setup_logging(rank, "node")
    children = Children(address)
    end = WorkerEnd(address, rank, children.report)
    while (order := end.next()).kind != channel.END:
        if order.kind == channel.SPAWN:
            children.start(order.read())
        elif order.kind == channel.KILL:
            children.kill_one(order.read())
    children.wait(END_LIMIT_S)
    children.kill()
    end.answer(order, None)
    end.close()
    sys.exit(0)


if __name__ == "__main__":
    main()
