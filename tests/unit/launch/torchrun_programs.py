"""Programs of two processes for the tests of the launcher: `python -m torchrun_programs CASE`."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time

import torch.distributed as dist

from mcore_rl.errors import RolloutError, UserError
from mcore_rl.launch import torchrun

WORLD_SIZE = 2
SHORT = datetime.timedelta(seconds=8)
"""Limit of collectives in the case that reads its data for longer than that."""


class Worker:
    """A worker without a model."""

    def __init__(self, spec, device) -> None:
        self.spec, self.rank = spec, dist.get_rank()
        if spec == "fail_at_start" and self.rank == 1:
            raise OSError("no weights here")

    def call(self, method, args):
        return getattr(self, method)(*args)

    def describe(self, *args):
        return self.rank, self.spec, *args

    def add_ranks(self):
        total = [None] * WORLD_SIZE
        dist.all_gather_object(total, self.rank)
        return sum(x for x in total if x is not None)

    def say_pid_and_wait(self):
        sys.stdout.write(f"{os.getpid()}\n")
        sys.stdout.flush()
        time.sleep(600)

    def fail_on(self, rank, kind):
        """Fail on one rank while the other waits for it in a collective."""
        if self.rank == rank:
            if kind == "rollout":
                raise RolloutError("the engine is gone", role="rollout")
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("layer 7")
        dist.barrier()

    def close(self):
        sys.stdout.write(f"closed {self.rank}\n")
        sys.stdout.flush()


def program(case, start):
    if case == "reads_long":
        time.sleep(3 * SHORT.total_seconds())
        case = "works"
    workers = start(case)
    workers.step = 5
    if case == "works":
        sys.stdout.write(f"common {workers.call('describe', 'a', 1)}\n")
        sys.stdout.write(f"each {workers.call_each('describe', [('b',), ('c',)])}\n")
        sys.stdout.write(f"collective {workers.call('add_ranks')}\n")
        sys.stdout.write(f"equal {workers.call('add_ranks') == workers.call('add_ranks')}\n")
        sys.stdout.flush()  # before the other rank says that it closed
        workers.close()
    elif case == "user_error_while_running":
        raise UserError("the reward of 'x' failed.")
    elif case == "wait":
        workers.call("say_pid_and_wait")
    elif case == "controller_fails":
        raise ZeroDivisionError("in the loop")
    else:
        rank, kind = case.split("_")
        workers.call("fail_on", int(rank), kind)


def main():
    case = sys.argv[1]
    try:
        if not torchrun.is_launched():
            sys.exit(torchrun.launch_processes("torchrun_programs", sys.argv[1:], WORLD_SIZE))
        if case == "reads_long":
            torchrun.COLLECTIVE_TIMEOUT = SHORT
        world_size = 3 if case == "wrong_world_size" else WORLD_SIZE
        torchrun.run_program(world_size, Worker, lambda start: program(case, start))
    except Exception as error:  # noqa: BLE001  as the commands do
        torchrun.end_process(error)


if __name__ == "__main__":
    main()
