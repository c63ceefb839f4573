"""The nodes of a Ray cluster: each looks at itself, in a process that Ray starts there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mcore_rl.doctor.nodes import Report, report_from_json
from mcore_rl.doctor.rows import Row, Status


def look(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return the output of the doctor on this machine, or its error if it prints nothing.

    Args:
        arguments: of the command, beside --json.
        environment: of the driver, as far as it is forwarded.
    """
    command = [sys.executable, "-m", "mcore_rl.cli", "doctor", "--json", *arguments]
    done = subprocess.run(
        command,
        env=os.environ | dict(environment),
        capture_output=True,
        text=True,
        errors="replace",
    )
    return done.stdout or done.stderr[-500:]


def reports_of_nodes(address: str, arguments: Sequence[str], limit_s: float) -> list[Report]:
    """Return the report of every machine of a cluster; one that does not answer is a fault.

    A machine is looked at with all its devices, so a job that has them is waited for.

    Args:
        address: of the cluster.
        arguments: of the command on each machine, beside --json.
        limit_s: how long all of them together may take.

    Raises:
        UserError: if Ray is not installed, or the cluster is not there.
    """
    from mcore_rl.launch.ray import forwarded, join_cluster, submit_to_nodes  # may be missing

    ray = join_cluster(address)
    deadline = time.monotonic() + limit_s
    tasks = submit_to_nodes(look, list(arguments), forwarded(os.environ))
    try:
        return [
            _report(number, host, ray, task, deadline) for number, (host, task) in enumerate(tasks)
        ]
    finally:
        ray.shutdown()


def _report(number: int, host: str, ray: Any, task: Any, deadline: float) -> Report:
    try:
        text = ray.get(task, timeout=max(0.0, deadline - time.monotonic()))
        return report_from_json(number, host, text)
    except (ray.exceptions.RayError, ValueError) as error:  # GetTimeoutError is a RayError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        row = Row(name="report", found=lines[-1], status=Status.FAULT, fix="see the node's logs")
        return Report(number, host, [row], has_come=False)
