"""A command in a process of its own that may fail, die or hang without harm to who started it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcore_rl.processes import ending, kill

_END_S = 10.0
"""How long a process may take to end its children and itself when it is told to."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    exit_code: int | None
    """None: it was ended because its time was up; negative: the signal that ended it."""
    log: str
    """What it and its children wrote to stdout and stderr."""

    @property
    def reason(self) -> str:
        """One line on why it failed: the first `error: ...` that it wrote, if it wrote one."""
        if self.exit_code is None:
            return "did not end in time"
        lines = self.log.splitlines()
        said = next((line for line in lines if line.startswith("error: ")), None)
        if said is not None:
            return said.removeprefix("error: ")
        if self.exit_code < 0:
            return f"ended by {ending(self.exit_code)}"
        return ending(self.exit_code)


def run_module(
    module: str,
    argv: Sequence[str],
    log_file: Path,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run `python -m module argv` until it ends or its time is up.

    Args:
        module: starts further processes by `launch.torchrun` alone, so that they end with it.
        argv: its arguments.
        log_file: written here meanwhile.
        timeout_s: seconds.
        environment: added to this process's.
    """
    with log_file.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
        )
        try:
            exit_code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            _end(process)
    return Ended(exit_code, log_file.read_text(encoding="utf-8", errors="replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        kill([process])
