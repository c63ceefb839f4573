"""Programs of a controller and two workers without models: `python -m launch_programs CASE LIMIT`.

As a plug-in of the worker processes it puts `ProbeWorker` in the place of the real worker, so that
they do not import Megatron.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import types
from typing import Protocol

from mcore_rl.cluster.group import call, call_all, results
from mcore_rl.cluster.placement import colocated
from mcore_rl.errors import RolloutError, UserError
from mcore_rl.launch import group, local, torchrun
from mcore_rl.launch.ending import end_process, run_with_workers
from mcore_rl.types import Layout

WORLD_SIZE = 2
REAL_WORKER = "mcore_rl.workers.worker"


class Probe(Protocol):
    """The role of these workers."""

    def describe(self, *args: object) -> tuple: ...

    def add_ranks(self) -> int: ...

    def wait(self, seconds: float) -> int: ...

    def fail(self, rank: int, kind: str) -> None: ...

    def send_back(self, value: object) -> object: ...


class ProbeWorker:
    """A worker without a model."""

    def __init__(self, spec, device) -> None:
        self.spec, self.rank = spec, int(os.environ["RANK"])
        self.handlers = {
            Probe.describe: lambda *args: (self.rank, self.spec, *args),
            Probe.add_ranks: self.add_ranks,
            Probe.wait: self.wait,
            Probe.fail: self.fail,
            Probe.send_back: lambda value: value,
        }
        if spec == "fail_at_start" and self.rank == 1:
            raise OSError("no weights here")
        if spec == "lack_at_start" and self.rank == 1:
            raise RuntimeError("operator torchvision::nms does not exist")

    def add_ranks(self):
        import torch.distributed as dist

        total = [None] * WORLD_SIZE
        dist.all_gather_object(total, self.rank)
        return sum(x for x in total if x is not None)

    def wait(self, seconds):
        time.sleep(seconds)
        return self.rank

    def fail(self, rank, kind):
        """Fail on one rank while the other waits for it in a collective."""
        import torch.distributed as dist

        if self.rank == rank:
            if kind == "rollout":
                raise RolloutError("the engine is gone", role="rollout")
            if kind == "user":
                raise UserError("the reward of 'x' failed.")
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            raise KeyError("layer 7")
        dist.barrier()

    def close(self):
        say(f"closed {self.rank}")


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def program(case: str, workers) -> None:
    if case == "mistake":
        raise UserError("the data is not there.")
    workers.start(case)
    workers.step = 5
    match case.split("_"):
        case ["works"]:
            say(f"common {call_all(workers, Probe.describe, 'a', 1)}")
            each = {rank: call(Probe.describe, f"to {rank}") for rank in (1, 0)}
            say(f"each {results(workers.submit(each))}")
            say(f"one {results(workers.submit({1: call(Probe.describe)}))}")
            say(f"collective {call_all(workers, Probe.add_ranks)}")
            workers.close()
        case ["arrays"]:
            send_arrays(workers)
            workers.close()
        case ["cancel"]:
            cancel(workers)
            workers.close()
        case ["idle"]:
            say("up")
            time.sleep(600)
        case ["waits"]:
            futures = workers.submit({rank: call(Probe.wait, 600) for rank in range(WORLD_SIZE)})
            say("up")
            results(futures)
        case ["reminds"]:
            logging.getLogger().setLevel(logging.INFO)
            group.REMINDER_S = 1.0
            results(workers.submit({1: call(Probe.wait, 4.0)}))
            workers.close()
        case ["controller", "fails"]:
            raise ZeroDivisionError("in the loop")
        case [rank, kind]:
            call_all(workers, Probe.fail, int(rank), kind)


def send_arrays(workers) -> None:
    """Send arrays of all sizes around; say so if they come back as they went."""
    import numpy as np

    sent = {
        "small": [np.arange(n, dtype=np.float32) for n in (0, 1, 3, 1000)],
        "large": np.arange(1 << 20, dtype=np.int32),
        "mask": np.arange(77) % 3 == 0,
        "text": "t" * (1 << 17),
    }
    for found in call_all(workers, Probe.send_back, sent):
        assert isinstance(found, dict)
        assert found["text"] == sent["text"]
        got = [*found["small"], found["large"], found["mask"]]
        for array, wanted in zip(got, [*sent["small"], sent["large"], sent["mask"]], strict=True):
            assert array.dtype == wanted.dtype
            assert array.flags.aligned
            np.testing.assert_array_equal(array, wanted)
    say("equal")


def cancel(workers) -> None:
    """Cancel a call that its worker has not begun: it is not done, the next one is."""
    first = workers.submit({1: call(Probe.wait, 1.0)})[1]
    second = workers.submit({1: call(Probe.fail, 1, "killed")})[1]
    third = workers.submit({1: call(Probe.describe, "after")})[1]
    say(f"cancelled {second.cancel()}")
    say(f"{first.result()} {third.result()}")


def main() -> None:
    case, hang_timeout_s = sys.argv[1], float(sys.argv[2])
    logging.basicConfig()
    try:
        if torchrun.is_launched() and torchrun.rank() > 0:
            torchrun.serve_controller()
        open_workers = torchrun.open_workers if torchrun.is_launched() else local.open_workers
        layout = Layout(dp=3 if case == "size" else WORLD_SIZE)
        placement = colocated(layout, layout.world_size, None)
        run_with_workers(
            lambda give_up: open_workers(placement, "", hang_timeout_s, give_up),
            lambda workers: program(case, workers),
            failure_grace_s=torchrun.FAILURE_GRACE_S if torchrun.is_launched() else 0.0,
        )
    except Exception as error:  # noqa: BLE001  as the commands do
        end_process(error)


def stand_in() -> None:
    """Have what a worker process imports as the real worker be the probe."""
    module = types.ModuleType(REAL_WORKER)
    vars(module)["Worker"] = ProbeWorker
    sys.modules[REAL_WORKER] = module


if __name__ == "__main__":
    import launch_programs  # so that what is sent to the workers is of a module that they know

    launch_programs.main()
elif "RANK" in os.environ:
    stand_in()
