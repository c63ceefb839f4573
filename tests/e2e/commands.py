"""The real command in processes of its own: started, waited for, killed with all its children."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LIMIT_S = 600
"""Of one command: up to a minute on two idle cores, where it launches others one by one; a busy
machine may take ten times as long."""
TEST_LIMIT_S = 2 * LIMIT_S + 100
"""Of a test of one or two commands, with the files that they need; pytest's own is shorter."""


def start(
    *argv: str,
    module: str = "mcore_rl.train",
    torchrun: int = 0,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start the command, by itself or under torchrun with so many processes; `environment` is
    added to that of all commands."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={torchrun}", "-m"] if torchrun else []
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, module, *argv],
        env=ENVIRONMENT | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Command(Protocol):
    """What is needed of `subprocess.Popen`."""

    args: Any
    pid: int
    returncode: Any

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]: ...


def finish(process: Command) -> subprocess.CompletedProcess[str]:
    """Wait for the command; one that does not end is killed with its children."""
    try:
        stdout, stderr = process.communicate(timeout=LIMIT_S)
    except BaseException:  # pytest's own limit too
        kill_all(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(*argv: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return finish(start(*argv, **how))


def kill_all(process: Command) -> None:
    """kill -9 of the command and everything that it started."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=30)
    process.communicate()


def wait_for(condition: Callable[[], bool], process: Command) -> None:
    """Return as soon as the condition holds; fail if the command ends or takes too long before."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        if time.monotonic() > deadline:
            kill_all(process)
            raise AssertionError("nothing happened in time")
        time.sleep(0.02)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the finished lines of a file with one object per line; none if it is not there."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n")]


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """Return every line of metrics.jsonl without what the clock says."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))}
        for line in read_lines(run_dir / "metrics.jsonl")
    ]


def hash_files(folder: Path) -> dict[str, str]:
    """Return the digest of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
