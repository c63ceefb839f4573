"""Processes that stand for the workers of 64 devices, at the other ends of their sockets.

Each process holds the ends of all ranks of some data-parallel ranks, one connection a rank. The
first rank of a share answers as a model would: numbers for every token of a pass, metrics of an
update. What comes and goes is counted where it leaves and enters the socket.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mcore_rl.cluster.placement import EnginePlace, Placement
from mcore_rl.frames import encode, num_bytes
from mcore_rl.launch import channel
from mcore_rl.launch.channel import Listener, Order, WorkerEnd
from mcore_rl.launch.ending import end_process
from mcore_rl.launch.folder import PrivateFolder
from mcore_rl.launch.group import ChannelWorkers
from mcore_rl.launch.processes import SECRET_VARIABLE, Ended
from mcore_rl.metrics import Metrics, mean
from mcore_rl.sockets import Address
from mcore_rl.types import MicroBatch, Share, TokenNumbers
from mcore_rl.workers.roles import Actor, RouteHolder

HANG_TIMEOUT_S = 600.0
NUM_METRICS = 20
"""Of an update, from the ranks that report."""


@dataclass
class Counts:
    """What one rank was sent, and answered, by the calls of one method."""

    sent: int = 0
    """Bytes: kind, header and frames."""
    answered: int = 0
    tokens: int = 0
    """Of shares; of routes that were to be taken from another rank."""
    checksum: float = 0.0
    """Of the ids and, where they are there, the advantages of the shares."""


class Receiver(Protocol):
    """What the benchmark asks of these workers beside the calls of an actor."""

    def counts(self) -> dict[str, Counts]:
        """Return what was sent and answered, by method."""
        ...


def answer_pass(share: Share | None) -> TokenNumbers:
    """Return for each token of a share a number that tells which token it is."""
    whole = MicroBatch.of([]) if share is None else share.whole
    return TokenNumbers(
        indices=whole.indices, lengths=whole.lengths, numbers=numbers_of(whole.token_ids)
    )


def numbers_of(token_ids: np.ndarray) -> np.ndarray:
    """Return what a pass answers for these tokens."""
    return -token_ids.astype(np.float32)


def answer_update(share: Share | None, denominators: Any, objective: Any) -> Metrics:
    """Return as many metrics as an actor has; none on ranks without a share."""
    if share is None:
        return {}
    return {f"actor/{number}": mean(0.5, len(share.whole.lengths)) for number in range(NUM_METRICS)}


def checksum(batch: Any) -> float:
    """Return a number that depends on every id and advantage of what has them."""
    advantages = 0.0 if batch.advantages is None else batch.advantages.sum(dtype=np.float64)
    return float(batch.token_ids.sum(dtype=np.int64) + advantages)


def serve(end: WorkerEnd) -> None:
    """Do what the controller says until it says that it is over."""
    counts: dict[str, Counts] = {}
    handlers = {
        Actor.logprobs: answer_pass,
        Actor.ref_logprobs: answer_pass,
        Actor.begin_step: lambda: None,
        Actor.update: answer_update,
        RouteHolder.exchange: lambda gives, takes: None,
        RouteHolder.drop: lambda: None,
        Receiver.counts: lambda: counts,
    }
    while True:
        order = end.next()
        if order.kind == channel.END:
            end.answer(order, None)
            end.close()
            return
        value = order.read()
        if order.kind == channel.START:
            end.answer(order, "")
            continue
        method, args = value
        answer = handlers[method](*args)
        if method is not Receiver.counts:
            of_method = counts.setdefault(method.__name__, Counts())
            of_method.sent += _size(order)
            of_method.answered += num_bytes(encode(answer))
            for share in (arg for arg in args if isinstance(arg, Share)):
                of_method.tokens += len(share.whole.token_ids)
                of_method.checksum += checksum(share.whole)
            if method is RouteHolder.exchange:
                of_method.tokens += sum(int(taken[:, 1].sum()) for taken in args[1].values())
        end.answer(order, answer)


def _size(order: Order) -> int:
    return len(order.kind) + len(json.dumps(order.header)) + num_bytes(order.frames)


class Receivers:
    """The processes, as `Processes` of the package; they end with this one."""

    def __init__(self, placement: Placement, num_processes: int, address: Address) -> None:
        self.placement = placement
        self.nodes: Sequence[int] = ()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for number in range(num_processes):
            shares = placement.share_ranks[number::num_processes]
            ranks = [rank for of_share in shares for rank in of_share]
            command = [sys.executable, __file__, address.endpoint, *map(str, ranks)]
            environment = os.environ | {SECRET_VARIABLE: address.secret.hex()}
            process = subprocess.Popen(command, env=environment)
            self._processes |= dict.fromkeys(ranks, process)

    def heard(self, report: Mapping[str, Any]) -> None:
        """See `Processes`."""

    def is_remote(self, rank: int) -> bool:
        """See `Processes`."""
        return False

    def ended(self) -> Mapping[int, Ended]:
        """See `Processes`."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        return {rank: Ended(code) for rank, code in codes.items() if code is not None}

    def state(self, rank: int) -> str:
        """See `Processes`."""
        return f"process {self._processes[rank].pid}"

    def kill_one(self, rank: int) -> None:
        """See `Processes`."""
        raise AssertionError("there are no engines")

    def restart(self, engine: EnginePlace) -> None:
        """See `Processes`."""
        raise AssertionError("there are no engines")

    def wait(self, seconds: float) -> bool:
        """See `Processes`."""
        deadline = time.monotonic() + seconds
        for process in set(self._processes.values()):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
        return True

    def kill(self) -> None:
        """See `Processes`."""
        for process in set(self._processes.values()):
            process.kill()
            process.wait()


@contextmanager
def receiving(placement: Placement, num_processes: int) -> Iterator[ChannelWorkers]:
    """Yield the workers of a placement, of which nothing is real but their sockets."""
    folder = PrivateFolder()
    address = Address(f"ipc://{folder.path}/calls", secrets.token_bytes(32))
    listener = Listener(address)
    receivers = Receivers(placement, num_processes, address)
    workers = ChannelWorkers(listener, receivers, HANG_TIMEOUT_S, end_process)
    try:
        workers.start(None)
        yield workers
        workers.close()
    except BaseException:
        workers.kill()
        raise
    finally:
        folder.remove()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("endpoint")
    parser.add_argument("ranks", type=int, nargs="+")
    args = parser.parse_args(argv)
    address = Address(args.endpoint, bytes.fromhex(os.environ.pop(SECRET_VARIABLE)))
    ends = [WorkerEnd(address, rank) for rank in args.ranks]
    threads = [threading.Thread(target=serve, args=(end,)) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    import controller_receivers  # so that what comes is of a module that this process knows

    controller_receivers.main(sys.argv[1:])
