"""Processes joined by gloo, for tests that need several ranks or Megatron's CPU support.

    results = processes.run(cases.add_ranks, 2, 10)    # [10, 11] if add_ranks adds its rank to 10

The function runs in every process, inside a default process group of that size; what it returns
comes back by rank. Functions, arguments and results travel by pickle, so a function must be one of
a module under `tests/`. The processes are started when first needed and serve the whole session:
importing torch and Megatron takes seconds, a fresh process group milliseconds.

Megatron's CPU support replaces names of torch and Megatron for good, which is why it is installed
in these processes and never in pytest's own.

A failing rank fails the test with its traceback, a rank that hangs fails it after a timeout with
the stack of every thread on stderr; both end all processes, and the next test gets fresh ones.
"""

import datetime
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

TIMEOUT_S = 240
"""Less than pytest's own limit, so that the stacks of the processes are seen."""

_OTHERS_S = 2.0
"""How long other ranks may take to fail too before all are ended."""


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time."""


class ProcessPool:
    """As many processes as the largest group asked for so far."""

    def __init__(self):
        self._processes = []
        self._connections = []
        self._folder = tempfile.TemporaryDirectory(prefix="processes-")
        self._num_runs = 0

    def run(self, function, world_size, *args, timeout_s=TIMEOUT_S):
        """Call `function(*args)` on ranks 0 .. world_size - 1 and return the results by rank."""
        while len(self._processes) < world_size:
            self._start_one()
        self._num_runs += 1
        store = Path(self._folder.name) / f"store{self._num_runs}"
        for rank in range(world_size):
            command = pickle.dumps((function, args, rank, world_size, str(store)))
            self._connections[rank].send_bytes(command)
        answers = self._collect(world_size, timeout_s)
        failures = {rank: text for rank, (failed, text) in answers.items() if failed}
        if failures or len(answers) < world_size:
            self._end_all(show_stacks=not failures)
            missing = sorted(set(range(world_size)) - set(answers))
            texts = [f"--- rank {rank} ---\n{text}" for rank, text in failures.items()]
            if not failures:
                texts = [f"ranks {missing} did not answer within {timeout_s} s: stacks on stderr"]
            raise RankError("\n".join(texts))
        return [answers[rank][1] for rank in range(world_size)]

    def close(self):
        """End all processes; the pool can start again."""
        self._end_all(show_stacks=False)

    def _start_one(self):
        # Not fork: the parent has threads and torch in it. Not daemon processes: Megatron's
        # checkpoint writer starts a process of its own.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,))
        process.start()
        theirs.close()
        self._processes.append(process)
        self._connections.append(ours)

    def _collect(self, world_size, timeout_s):
        """Return rank -> (failed, result or traceback), of as many ranks as answered."""
        rank_of = {self._connections[rank]: rank for rank in range(world_size)}
        answers = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < world_size:
            waiting = [c for c, rank in rank_of.items() if rank not in answers]
            left_s = max(0, deadline - time.monotonic())
            ready: list[Any] = multiprocessing.connection.wait(waiting, left_s)
            if not ready:
                return answers
            for connection in ready:
                try:
                    answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    answer = True, "the process died"
                answers[rank_of[connection]] = answer
                if answer[0]:
                    deadline = min(deadline, time.monotonic() + _OTHERS_S)
        return answers

    def _end_all(self, *, show_stacks):
        for process in self._processes:
            if show_stacks and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(0.5)
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        self._processes, self._connections = [], []


def _serve(connection):
    """Do what comes through the pipe until it closes; the main function of a process."""
    os.setpgid(0, 0)  # ended as a group, with what Megatron started
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TORCH_CPP_LOG_LEVEL="ERROR",
    )
    warnings.simplefilter("ignore")
    while True:
        try:
            command = connection.recv_bytes()
        except EOFError:
            os.killpg(0, signal.SIGKILL)
            raise  # it is not reached
        try:
            answer = False, _call_in_group(*pickle.loads(command))
        except Exception:  # noqa: BLE001  whatever it is, the test shows it
            answer = True, traceback.format_exc()
        sys.stdout.flush()
        connection.send_bytes(pickle.dumps(answer))


def _call_in_group(function, args, rank, world_size, store):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    result = function(*args)
    dist.barrier()
    dist.destroy_process_group()
    _release_groups()
    return result


def _release_groups():
    """Free every process group of the run: each that is left has three threads that poll."""
    embeddings = sys.modules.get("megatron.core.models.common.embeddings")
    if embeddings is not None:  # their caches have groups in their keys
        embeddings.RotaryEmbedding.forward.cache_clear()
        embeddings.YarnRotaryEmbedding.forward.cache_clear()
    while gc.collect():  # models hold groups and are cycles; a finalizer frees more cycles
        pass
    # What is left are modules, most of a collection's work. The next ones need not look at them.
    gc.freeze()


def _end_with_parent():
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
