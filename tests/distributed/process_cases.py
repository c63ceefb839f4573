"""What the processes are asked to do in the tests of `processes.py`."""

import os
import time

import torch
import torch.distributed as dist


def add_ranks(number):
    """Return `number` plus this rank, by a collective: [number + sum of ranks, own pid]."""
    total = torch.tensor([dist.get_rank()])
    dist.all_reduce(total)
    return number + int(total), os.getpid()


def fail_on_rank_1():
    """Raise on rank 1 while rank 0 waits for it."""
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def hang_on_rank_1():
    """Leave rank 1 out of a collective."""
    if dist.get_rank() == 1:
        time.sleep(3600)
    dist.barrier()


def die_on_rank_1():
    """End rank 1 without a word."""
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()
