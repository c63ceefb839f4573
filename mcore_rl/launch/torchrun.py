"""Every rank runs the same program; rank 0 is controller and worker, the others serve commands.

A command is a method name with arguments. Rank 0 scatters it over a gloo group of its own, takes
part in it, and gathers the results. A worker that fails ends its process at once with rank and
step in the message; the elastic agent then ends the others.

Started by `torchrun`, or by `launch_processes` when the command was started as one process.
"""

from __future__ import annotations

import datetime
import logging
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from mcore_rl.errors import USER_ERROR_EXIT_CODE, CheckpointError, RunError, UserError
from mcore_rl.printable import printable

logger = logging.getLogger(__name__)

# A worker waits for its next command as long as the controller judges, validates or writes, and
# for the first one as long as it reads the data.
COMMAND_TIMEOUT = datetime.timedelta(days=7)
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
# torchrun's agent looks after its processes every 0.1 s and ends them when one has failed.
AGENT_GRACE_S = 20.0
_AGENT_PID = "MCORE_RL_AGENT_PID"
_STARTED = "mcore_rl/started"


def is_launched() -> bool:
    """Whether this process is one of a launched set (torchrun or Slurm set RANK)."""
    return "RANK" in os.environ


def rank() -> int:
    """Return this process's global rank; 0 when it was started alone."""
    return int(os.environ.get("RANK", "0"))


def launch_processes(module: str, argv: Sequence[str], num_processes: int) -> int:
    """Start `num_processes` of `python -m module argv` on this machine and return the exit code.

    The exit code is that of the first process that failed, 0 if none did.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The failing process has said what is wrong; the agent would say it again with a traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[_AGENT_PID] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *argv)
    except ChildFailedError as error:
        failed_rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        # Ended by a signal, so it could not speak; the exit code is the shell's convention.
        ended = RunError(f"the process was ended by {failure.signal_name()}", rank=failed_rank)
        sys.stderr.write(f"error: {ended}\n")
        return 128 - failure.exitcode
    return 0


def run_program(
    world_size: int,
    make_worker: Callable[[Any, torch.device], Any],
    program: Callable[[Callable[[Any], TorchrunWorkers]], None],
) -> None:
    """Run `program` on rank 0 and serve its commands on the other ranks.

    Args:
        world_size: processes that the configuration asks for.
        make_worker: (spec, device) -> this rank's worker, with a `call(method, args)` method.
        program: the controller; it is given a function that starts the workers from a spec,
            which it calls when its inputs have proved good.

    Raises:
        UserError: if another number of processes was launched.
        Whatever the program raises, on rank 0; on other ranks a failure ends the process.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # The parent now, unless it says who it was: it may have gone while this process started.
        agent = int(os.environ.get(_AGENT_PID, os.getppid()))
        threading.Thread(target=_end_with_agent, args=(agent,), daemon=True).start()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise UserError(
            f"trainer.n_gpus_per_node * trainer.nnodes = {world_size}, but {launched} processes "
            "were launched. Make them agree."
        )
    store = _meet()
    if rank() == 0:
        program(lambda spec: TorchrunWorkers(spec, make_worker, store))
        return
    _serve(make_worker, store)


def _end_with_agent(agent: int) -> None:
    """End this process when the agent that started it is gone.

    The agent gives every process a session of its own, so what kills the agent spares them, and
    they would go on writing the run folder that the user has begun to resume.
    """
    while os.getppid() == agent:
        time.sleep(0.5)
    os._exit(1)


class TorchrunWorkers:
    """The `WorkerGroup` of rank 0; starts all workers from `spec`."""

    def __init__(
        self, spec: Any, make_worker: Callable[[Any, torch.device], Any], store: Store
    ) -> None:
        store.set(_STARTED, "")
        self._commands, device = _join(store)
        self.world_size = dist.get_world_size()
        self.step: int | None = None
        _broadcast(spec, self._commands)
        self._worker = make_worker(spec, device)
        _gather(None, self._commands)  # every worker is up

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call `method` with the same arguments on every worker; return results by rank."""
        return self.call_each(method, [args] * self.world_size)

    def call_each(self, method: str, args_of_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call `method` on every worker with its own arguments; return results by rank."""
        commands = [(method, args, self.step) for args in args_of_rank]
        _, own_args, _ = _scatter(commands, self._commands)
        try:
            result = self._worker.call(method, own_args)
        except Exception as error:
            raise _located(error, f"worker, {method}", self.step) from error
        return _gather(result, self._commands)

    def close(self) -> None:
        """Let the other ranks end, then this one's worker."""
        _scatter([None] * self.world_size, self._commands)
        _leave(self._worker)


def _meet() -> Store:
    """Return the store of all processes; rank 0 waits for nobody, so it names mistakes at once."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    is_hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun's agent
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank() == 0 and not is_hosted,
        timeout=COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
    )
    # The agent's store outlives processes that it starts again.
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _join(store: Store) -> tuple[dist.ProcessGroup, torch.device]:
    """Create the default process group and that of the commands."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    world_size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        backend, store=store, rank=rank(), world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )
    commands = dist.new_group(backend="gloo", timeout=COMMAND_TIMEOUT)
    assert isinstance(commands, dist.ProcessGroup)
    return commands, device


def _leave(worker: Any) -> None:
    """Close the worker when every rank has come this far."""
    dist.barrier()
    worker.close()
    if dist.is_initialized():  # vLLM destroys the default group with its engine
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(make_worker: Callable[[Any, torch.device], Any], store: Store) -> None:
    """Do what rank 0 says until it says nothing more."""
    method, step = "start", None
    try:
        store.wait([_STARTED], COMMAND_TIMEOUT)
        commands, device = _join(store)
        worker = make_worker(_broadcast(None, commands), device)
        _gather(None, commands)
        while (command := _scatter(None, commands)) is not None:
            method, args, step = command
            _gather(worker.call(method, args), commands)
        _leave(worker)
    except Exception as error:  # noqa: BLE001  whatever it is, this process must end now
        end_process(_located(error, f"worker, {method}", step))


def _located(error: Exception, role: str, step: int | None) -> Exception:
    """Return the error with what it lacks of rank, role and step; a user's mistake as it is."""
    if isinstance(error, UserError):
        return error
    known = error if isinstance(error, RunError) else RunError(f"{type(error).__name__}: {error}")
    located = type(known)(
        known.message,
        rank=rank() if known.rank is None else known.rank,
        role=known.role or role,
        step=step if known.step is None else known.step,
    )
    located.__cause__ = error
    return located


def end_process(error: Exception) -> None:
    """Say what went wrong and end this process at once, with exit code 2 for a user's mistake.

    The exit is immediate: other ranks may wait in a collective for this one, and orderly
    shutdown would wait for them. What another rank says better waits, to be ended unsaid.
    """
    if _is_said_elsewhere(error):
        time.sleep(AGENT_GRACE_S)
    code, trace = USER_ERROR_EXIT_CODE, ""
    if not isinstance(error, UserError):
        trace = "".join(traceback.format_exception(error))
        error, code = _located(error, "controller", None), 1
    line = str(error).replace("\n", "\\n")  # a name that the user gave may hold one
    # In one piece, since other ranks may be writing to the same file.
    sys.stderr.write(printable(f"{trace}error: {line}\n"))
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


def _is_said_elsewhere(error: Exception) -> bool:
    """Whether this is but the echo of another rank's failure, or one that rank 0 names too: a
    user's mistake, or a checkpoint that no rank can read.

    Then the agent that started the processes ends this one before long; where there is none, it
    speaks after all.
    """
    if isinstance(error, (UserError, CheckpointError)):
        return rank() > 0
    return any(
        text in str(error)
        for text in ("Connection closed by peer", "Connection reset by peer", "DistNetworkError")
    )


def _broadcast(value: Any, group: dist.ProcessGroup) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]


def _scatter(values: list[Any] | None, group: dist.ProcessGroup) -> Any:
    box: list[Any] = [None]
    dist.scatter_object_list(box, values, src=0, group=group)
    return box[0]


def _gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    box = [None] * group.size() if dist.get_rank() == 0 else None
    dist.gather_object(value, box, dst=0, group=group)
    return box or []
