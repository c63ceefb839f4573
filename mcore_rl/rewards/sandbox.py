"""Run Python programs that a model wrote, without harm to the machine, the run or the scores.

One sandbox holds one program and runs it on test after test, each in a fresh process: one process
of one thread, with its own folder and nothing else of the machine (`jail.py` says by which means).
Whatever a program does, the outcome of its test says so, and the next test can run.

What it does not do: programs run as this user on this kernel, so a fault of the kernel is a way
out; they see names and sizes of files that they cannot open; they share the CPUs with the run.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import RunError, UserError
from mcore_rl.rewards import jail
from mcore_rl.rewards.base import SandboxConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program did on one test."""

    output: str
    """What it wrote to standard output; for a call, its result as JSON."""
    failure: str
    """Why it did not end well: "time limit", "output limit", "file limit", "exit code 1" (an
    exception, also for lack of memory), "exit code -24" (CPU time); "" if it did."""


class Sandbox:
    """A context in which one program is run on tests.

    Args:
        source: the program.
        cfg: its limits.

    Raises:
        UserError: by every test, if a protection is missing that `cfg` does not allow to miss.
    """

    def __init__(self, source: str, cfg: SandboxConfig) -> None:
        self._source, self._cfg = source, cfg

    def __enter__(self) -> Sandbox:
        self._folder = tempfile.TemporaryDirectory(prefix="sandbox-")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", jail.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={},
            cwd="/",
        )
        self._write(
            {
                "source": self._source,
                "folder": self._folder.name,
                "site_packages": sorted({sysconfig.get_path(n) for n in ("purelib", "platlib")}),
                "allow_missing": self._cfg.allow_missing,
                "limits": {
                    "cpu_s": self._cfg.cpu_s,
                    "memory_bytes": self._cfg.memory_mib * 2**20,
                    "file_bytes": self._cfg.file_mib * 2**20,
                    "output_bytes": self._cfg.output_mib * 2**20,
                },
            }
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()  # and with it the program
        self._process.communicate()
        self._folder.cleanup()

    def run_program(self, stdin: str, timeout_s: float) -> Outcome:
        """Run the program on `stdin`."""
        return self._run({"kind": "program", "stdin": stdin}, timeout_s)

    def call(self, function: str, arguments: Sequence[Any], timeout_s: float) -> Outcome:
        """Call a function of the program, or of its class `Solution` where there is one."""
        test = {"kind": "call", "stdin": "", "function": function, "arguments": arguments}
        return self._run(test, timeout_s)

    def holds(self, assertions: str, timeout_s: float) -> bool:
        """Whether the program and then the code `assertions` run to their end.

        Both share a process, so a program written to deceive can pass without being right.
        """
        token = secrets.token_hex(16)
        test = {"kind": "assertions", "stdin": "", "assertions": assertions, "token": token}
        outcome = self._run(test, timeout_s)
        return not outcome.failure and outcome.output == token

    def _run(self, test: Mapping[str, Any], timeout_s: float) -> Outcome:
        self._write({**test, "timeout_s": timeout_s})
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"the sandbox ended ({self._process.wait()})", role="reward")
        answer = json.loads(line)
        if "missing" in answer:
            raise _refusal(answer["missing"])
        failure = answer["stopped"]
        if not failure and answer["exit_code"] != 0:
            failure = f"exit code {answer['exit_code']}"
        return Outcome(output=answer["output"], failure=failure)

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()


def check_sandbox(cfg: SandboxConfig) -> None:
    """Return if programs can be run here as `cfg` asks; call it before the run starts.

    Raises:
        UserError: if a protection is missing, or not even an empty program runs.
    """
    with Sandbox("print('ready')", cfg) as sandbox:
        outcome = sandbox.run_program("", cfg.test_timeout_s)
    if outcome.failure or outcome.output != "ready\n":
        raise UserError(
            f"reward.sandbox: an empty program does not run ({outcome.failure}). Raise the limits: "
            f"memory_mib={cfg.memory_mib}, test_timeout_s={cfg.test_timeout_s:g}."
        )


def _refusal(missing: Sequence[str]) -> UserError:
    return UserError(
        f"reward.sandbox: this system lacks {', '.join(missing)} (files: Landlock of Linux 5.13; "
        "calls: seccomp on x86-64 or Arm). Set "
        f"reward.sandbox.allow_missing=[{','.join(missing)}] to run programs all the same, in a "
        "container that holds nothing of value."
    )
