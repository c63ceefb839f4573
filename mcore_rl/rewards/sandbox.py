"""Run Python programs that a model wrote, without harm to the machine, the run or the scores.

One sandbox holds one program and runs it on test after test, each in a fresh process with a folder
of its own and nothing else of the machine (`mcore_rl/jail/` says by which means). Whatever a
program does, the outcome of its test says so, and the next test can run. Nothing of it outlives
this process, however that ends.

What it does not do: programs run as this user on this kernel, so a fault of the kernel is a way
out; they see names and sizes of files that they cannot open; they share the CPUs with the run.
"""

from __future__ import annotations

import json
import logging
import secrets
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mcore_rl
from mcore_rl.errors import RunError, UserError
from mcore_rl.rewards.base import SandboxConfig

logger = logging.getLogger(__name__)

_PACKAGE_ROOT = str(Path(mcore_rl.__file__).parents[1])
_SERVE = "import sys; sys.path.append(sys.argv[1]); from mcore_rl.jail.server import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a program on one test."""

    output: str
    """What it wrote to standard output; for a call, its result as JSON; for expressions, their
    values as `jail.plain_data` writes them."""
    failure: str
    """Why it did not end well: "time limit", "output limit", "thread limit", "file limit" (where
    the kernel does not refuse to write beyond it), "exit code 1" (an exception, also for lack of
    memory or of room for files), "exit code -24" (CPU time); "" if it did."""


class Sandbox:
    """A context in which one program is run on tests; costs nothing before the first test.

    Args:
        source: the program.
        cfg: its limits.

    Raises:
        UserError: by every test, if a protection is missing that `cfg` does not allow to miss.
    """

    def __init__(self, source: str, cfg: SandboxConfig) -> None:
        self._source, self._cfg = source, cfg
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.communicate()  # it takes the end of its input as the end of all

    def run_program(self, stdin: str, timeout_s: float) -> Outcome:
        """Run the program on `stdin`."""
        return self._run({"kind": "program", "stdin": stdin}, timeout_s)

    def call(self, function: str, arguments: Sequence[Any], timeout_s: float) -> Outcome:
        """Call a function of the program, or of its class `Solution` where there is one."""
        return self._run({"kind": "call", "function": function, "arguments": arguments}, timeout_s)

    def evaluate(self, steps: Sequence[tuple[str, str]], timeout_s: float) -> Outcome:
        """Run the program, then code in its process: ("exec", statement) or ("eval", expression).

        The output holds the values of the expressions. The program can read the code.
        """
        return self._run({"kind": "values", "steps": steps}, timeout_s)

    def judge(self, code: str, values: Sequence[Any], timeout_s: float) -> bool:
        """Whether `code` runs to its end without the program, given values of `evaluate`.

        The code can use `_value_0`, `_value_1`, ..., and `_is_same` of `jail.plain_data`. Only for
        a sandbox without a program: later processes of the sandbox may find these values.
        """
        assert not self._source
        test = {"kind": "verdict", "code": code, "values": values}
        outcome = self._run(test, timeout_s)
        return not outcome.failure and outcome.output == "holds"

    def holds(self, assertions: str, timeout_s: float) -> bool:
        """Whether the program and then the code `assertions` run to their end.

        Both share a process, so a deceptive program can pass without being right.
        """
        token = secrets.token_hex(16)
        test = {"kind": "assertions", "assertions": assertions, "token": token}
        outcome = self._run(test, timeout_s)
        return not outcome.failure and outcome.output == token

    def _run(self, test: Mapping[str, Any], timeout_s: float) -> Outcome:
        process = self._process or self._start()
        _write(process, {"stdin": "", **test, "timeout_s": timeout_s})
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RunError(f"the sandbox ended ({process.wait()})", role="reward")
        answer = json.loads(line)
        if "missing" in answer:
            raise _refusal(answer["missing"])
        failure = answer["stopped"]
        if not failure and answer["exit_code"] != 0:
            failure = f"exit code {answer['exit_code']}"
        return Outcome(output=answer["output"], failure=failure)

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SERVE, _PACKAGE_ROOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"MALLOC_ARENA_MAX": "1"},  # or every thread takes 64 MiB of address space
            cwd="/",
            start_new_session=True,  # lives on after a killed group until it has cleaned up
        )
        job = {
            "source": self._source,
            "package_root": _PACKAGE_ROOT,
            "site_packages": sorted({sysconfig.get_path(n) for n in ("purelib", "platlib")}),
            "temporary_folder": tempfile.gettempdir(),
            "allow_missing": self._cfg.allow_missing,
            "limits": {
                "cpu_s": self._cfg.cpu_s,
                "memory_bytes": self._cfg.memory_mib * 2**20,
                "file_bytes": self._cfg.file_mib * 2**20,
                "output_bytes": self._cfg.output_mib * 2**20,
            },
        }
        _write(self._process, job)
        return self._process


def _write(process: subprocess.Popen[bytes], message: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


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
    if cfg.share_assertions:
        logger.warning(
            "reward.sandbox.share_assertions=true: assertions that cannot be taken apart run "
            "beside the program, which can read what they expect and pass without solving "
            "anything; a model that is trained on them may learn to"
        )


def _refusal(missing: Sequence[str]) -> UserError:
    return UserError(
        f"reward.sandbox: this system lacks {', '.join(missing)} (files: Landlock of Linux 5.13; "
        "calls: seccomp on x86-64 or Arm). Set "
        f"reward.sandbox.allow_missing=[{','.join(missing)}] to run programs all the same, in a "
        "container that holds nothing of value."
    )
