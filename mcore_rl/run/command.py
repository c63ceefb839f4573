"""From a command line to a running program; shared by all commands that start workers.

    compose -> check -> start processes -> the program (inputs, workers, loop, export) -> end

The process of the command is the controller: it holds no shard and no engine. Its workers are its
children, or the other processes that torchrun started.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from mcore_rl.cluster.placement import Placement
from mcore_rl.config.compose import CommandLine, compose_config, parse_command_line, to_yaml
from mcore_rl.config.run import with_fetched_models
from mcore_rl.errors import require
from mcore_rl.launch import local, torchrun
from mcore_rl.launch.ending import end_process, run_with_workers
from mcore_rl.launch.group import ChannelWorkers, GiveUp
from mcore_rl.launch.libraries import quiet_libraries
from mcore_rl.observability.log_setup import setup_logging
from mcore_rl.processes import raise_file_limit
from mcore_rl.run.specs import placement_of

logger = logging.getLogger(__name__)

Config = TypeVar("Config")
OpenWorkers: TypeAlias = Callable[[Placement, str, float, GiveUp], ChannelWorkers]


def run_command(
    module: str,
    description: str,
    argv: Sequence[str],
    root: type[Config],
    check: Callable[[Config], None],
    program: Callable[[Config, ChannelWorkers], None],
    plan: Callable[[Config], None] | None = None,
    engine: Callable[[Config], str] = lambda _: "",
    parse: Callable[[str, str, Sequence[str]], CommandLine] = parse_command_line,
    place: Callable[[Any], Placement] = placement_of,
) -> None:
    """Run one command to its end; a user's mistake is one line and exit code 2.

    Args:
        module: name for `python -m`.
        description: one line for `--help`.
        argv: arguments without the program's name.
        root: type of the configuration.
        check: cross-section rules.
        program: what to do with worker processes; it starts the workers in them when its inputs
            have proved good.
        plan: what trainer.dry_run=true does in place of the program, without a worker.
        engine: returns the name of the rollout engine that the workers will start; "": none.
        parse: returns what a command line asks for, of its program, description and arguments.
        place: returns where the processes of the run stand.
    """
    try:
        if torchrun.is_launched() and torchrun.rank() > 0:
            torchrun.serve_controller()
            return
        line = parse(f"python -m {module}", description, argv)
        config: Any = compose_config(root, line)
        if line.show:
            if line.warning:
                sys.stderr.write(f"warning: {line.warning}\n")
            sys.stdout.write(to_yaml(config))
            return
        check(config)
        quiet_libraries()
        raise_file_limit()
        setup_logging(0, "controller")
        config = with_fetched_models(config)
        if line.warning:
            logger.warning("%s", line.warning)
        if config.trainer.dry_run:
            require(plan is not None, "trainer.dry_run", True, f"is not known to {module}")
            if plan is not None:
                plan(config)
            return
        open_workers = _launcher(config, module)
        placement, limit_s = place(config), config.trainer.hang_timeout_s
        run_with_workers(
            lambda give_up: open_workers(placement, engine(config), limit_s, give_up),
            lambda workers: program(config, workers),
            failure_grace_s=torchrun.FAILURE_GRACE_S if torchrun.is_launched() else 0.0,
        )
    except Exception as error:  # noqa: BLE001  its last words are one line
        end_process(error)


def _launcher(config: Any, module: str) -> OpenWorkers:
    """Return what starts the worker processes.

    Raises:
        UserError: if it is not what started this command, or does not reach all nodes.
    """
    trainer, name = config.trainer, config.trainer.launcher
    if name == "auto":
        name = "torchrun" if torchrun.is_launched() else "local"
    is_launched = torchrun.is_launched()
    fix = f"On every node: torchrun --nnodes {trainer.nnodes} ... -m {module}"
    if name == "torchrun":
        require(is_launched, "trainer.launcher", name, "did not start this command", f"{fix}.")
        return torchrun.open_workers
    rule = "starts all processes itself, and torchrun has started this command (RANK is set)"
    require(not is_launched, "trainer.launcher", name, rule, "Leave one of them out.")
    if name == "ray":
        from mcore_rl.launch import ray

        return ray.launcher(Path(trainer.default_local_dir))
    rule = "is more than this machine"
    fix += ", or trainer.launcher=ray in a cluster of Ray."
    require(trainer.nnodes == 1, "trainer.nnodes", trainer.nnodes, rule, fix)
    return local.open_workers
