"""What programs can and cannot do in the sandbox.

Nothing here is dangerous where the sandbox does not hold: it refuses to run the programs.
"""

import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mcore_rl.errors import RunError, UserError
from mcore_rl.rewards import jail
from mcore_rl.rewards.base import SandboxConfig
from mcore_rl.rewards.sandbox import Sandbox, check_sandbox

# So much CPU time that the other limits are always first; it has a test of its own.
LIMITS = SandboxConfig(cpu_s=30, memory_mib=256, file_mib=2, output_mib=1)
ENOUGH_S = 120.0
"""For programs that end by themselves, on a busy machine."""


def _run(program, stdin="", timeout_s=ENOUGH_S, limits=LIMITS):
    with Sandbox(textwrap.dedent(program), limits) as sandbox:
        return sandbox.run_program(stdin, timeout_s)


# Each is refused with an error of the system, and the program itself goes on.
REFUSED = {
    "reading a file": "open({outside!r} + '/secret').read()",
    "reading what the kernel says about the parent": "open(f'/proc/{{os.getppid()}}/environ')",
    "listing a folder": "os.listdir({outside!r})",
    "writing a file": "open({outside!r} + '/made', 'w')",
    "emptying a file": "os.open({outside!r} + '/secret', os.O_RDONLY | os.O_TRUNC)",
    "emptying a file that it may read": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "deleting a file": "os.remove({outside!r} + '/secret')",
    "moving a file": "os.rename({outside!r} + '/secret', 'mine')",
    "linking to a file": "os.link({outside!r} + '/secret', 'mine')",
    "changing a mode": "os.chmod({outside!r} + '/secret', 0o777)",
    "making a folder": "os.mkdir('folder')",
    "opening a socket": "socket.socket()",
    "opening a local socket": "socket.socket(socket.AF_UNIX)",
    "forking": "os._exit(0) if os.fork() == 0 else None",
    "starting a program": "subprocess.run(['/bin/true'])",
    "becoming another program": "os.execv('/bin/true', ['true'])",
    "starting a thread": "threading.Thread(target=print).start()",
    "killing its parent": "os.kill(os.getppid(), 9)",
    "killing its group": "os.killpg(0, 9)",
    "signals by way of a file": "fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "limits of its parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "tracing its parent": "call(101, 16, os.getppid(), 0, 0)",
    "a ring of calls": "call(425, 8, ctypes.create_string_buffer(120))",
    "memory without a file": "os.memfd_create('x')",
    "another user": "os.setuid(65534)",
    "more memory than the machine has": "bytearray(10 * 2**30)",
    "a large file": "open('large', 'wb').write(bytes(3 * 2**20))",
    "raising its limits": "resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, 2**40))",
}


@pytest.mark.parametrize("attempt", REFUSED)
def test_a_program_is_refused(attempt, tmp_path):
    (tmp_path / "secret").write_text("secret")
    mode = os.stat(tmp_path / "secret").st_mode
    program = f"""
        import ctypes, fcntl, os, resource, socket, subprocess, threading

        def call(*arguments):
            if ctypes.CDLL(None, use_errno=True).syscall(*arguments) == -1:
                raise OSError(ctypes.get_errno(), "refused")

        try:
            {REFUSED[attempt].format(outside=str(tmp_path))}
        except (OSError, MemoryError, RuntimeError, ValueError) as error:
            print("refused")
        else:
            print("done")
    """
    with Sandbox(textwrap.dedent(program), LIMITS) as sandbox:
        for _ in range(2):  # so the sandbox has survived the first
            outcome = sandbox.run_program("", ENOUGH_S)
            assert (outcome.output, outcome.failure) == ("refused\n", "")
    assert os.listdir(tmp_path) == ["secret"]
    assert (tmp_path / "secret").read_text() == "secret"
    assert os.stat(tmp_path / "secret").st_mode == mode


# Each would go on for ever; what stops it.
STOPPED = {
    "while True: pass": "time limit",
    "import time; time.sleep(600)": "time limit",
    "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\nwhile True: pass": (
        "time limit"
    ),
    "while True:\n    try: os.fork()\n    except OSError: pass": "time limit",
    "while True: sys.stdout.write('x' * 2**16)": "output limit",
    "while True: os.write(1, b'x' * 2**16)": "output limit",
    "for i in range(10**9): open(str(i), 'wb').write(bytes(2**20))": "file limit",
    "for i in range(10**9): open(str(i), 'wb')": "file limit",
    "x = ['x']\nwhile True: x += x": "exit code 1",
    "import re\nre.match('(a+)+$', 'a' * 60 + 'b')": "time limit",
}


@pytest.mark.parametrize("program", STOPPED)
def test_a_program_that_would_go_on_is_stopped(program):
    failure = STOPPED[program]
    timeout_s = 1.5 if failure == "time limit" else ENOUGH_S
    outcome = _run(f"import os, sys\n{program}", timeout_s=timeout_s)
    assert outcome.failure == failure
    assert len(outcome.output) <= LIMITS.output_mib * 2**20


def test_cpu_time_is_limited_apart_from_the_clock():
    limits = SandboxConfig(cpu_s=1)
    assert _run("while True: pass", limits=limits).failure == "exit code -24"  # SIGXCPU
    ignoring = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert _run(ignoring, limits=limits).failure == "exit code -9"


def test_privileges_are_given_up():
    """Of this user's, whatever they are: a program has no capability and gains none."""
    code = f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("jail", {jail.__file__!r})
        jail = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(jail)
        jail._drop_privileges()
        print(open("/proc/self/status").read())
    """
    status = subprocess.run(
        [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    none = "0" * 16
    assert [fields[name] for name in ("CapEff", "CapPrm", "CapInh")] == [none] * 3
    assert fields["NoNewPrivs"] == "1"


def test_nothing_of_a_program_is_left():
    program = """
        import os, time
        print(os.getcwd(), os.getpid(), flush=True)
        open("file", "w").write("x")
        time.sleep(600)
    """
    # Long enough that it has said so before it is stopped, on a busy machine.
    folder, pid = _run(program, timeout_s=10.0).output.split()
    assert not os.path.exists(folder)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_program_ends_with_a_sandbox_that_is_killed():
    program = "import os, time\nopen(str(os.getpid()), 'w')\ntime.sleep(600)"
    with ThreadPoolExecutor() as executor, Sandbox(program, LIMITS) as sandbox:
        outcome = executor.submit(sandbox.run_program, "", 600.0)
        while not (pids := os.listdir(sandbox._folder.name)):
            time.sleep(0.01)
        sandbox._process.kill()
        with pytest.raises(RunError, match="the sandbox ended"):
            outcome.result()
    until = time.monotonic() + ENOUGH_S
    while os.path.exists(f"/proc/{pids[0]}") and time.monotonic() < until:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pids[0]}")


# Program, standard input, output: what solutions to programming tasks do.
ORDINARY = {
    "input": ("print(int(input()) + int(input()))", "1\n2\n", "3\n"),
    "bytes": ("import sys\nprint(len(sys.stdin.buffer.read().split()))", "a b\nc", "3\n"),
    "unicode": ("print(input()[::-1])", "\u00e9\U0001f600", "\U0001f600\u00e9\n"),
    "main": ("if __name__ == '__main__':\n    print(1)", "", "1\n"),
    "classes": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nprint(P(1))",
        "",
        "P(x=1)\n",
    ),
    "exit": ("import sys\nprint(1)\nsys.exit()", "", "1\n"),
    "recursion": (
        "import sys\nsys.setrecursionlimit(10**6)\n"
        "def f(n): return n and 1 + f(n - 1)\nprint(f(20000))",
        "",
        "20000\n",
    ),
    "its own files": (
        "open('a', 'w').write('hi')\nimport os\nos.rename('a', 'b')\nprint(open('b').read())\n"
        "os.remove('b')\nprint(os.listdir())",
        "",
        "hi\n[]\n",
    ),
    "event loop": (
        "import asyncio\nasync def f(): print(await asyncio.sleep(0, 3))\nasyncio.run(f())",
        "",
        "3\n",
    ),
    "libraries": (
        "import bisect, collections, datetime, decimal, fractions, functools, heapq, io, itertools,"
        " json, math, random, re, statistics, string, time, typing\n"
        "import numpy as np\nprint(np.linalg.inv(np.eye(2)).sum(), random.random() < 1)",
        "",
        "2.0 True\n",
    ),
    "no environment": ("import os\nprint(dict(os.environ))", "", "{'OPENBLAS_NUM_THREADS': '1'}\n"),
    "large input": ("print(len(input()))", "x" * 2**20, f"{2**20}\n"),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_program_runs(name):
    program, stdin, output = ORDINARY[name]
    outcome = _run(program, stdin)
    assert (outcome.output, outcome.failure) == (output, "")


@pytest.mark.parametrize(
    "program",
    ["1 / 0", "def f(:", "raise SystemExit(3)", "raise SystemExit('no')", "\x00", "\ud800"],
)
def test_a_program_that_fails_has_an_exit_code(program):
    assert _run(program).failure == "exit code 1"


def test_a_crash_is_the_programs_only():
    outcome = _run("print('before', flush=True)\nimport ctypes\nctypes.string_at(0)")
    assert (outcome.output, outcome.failure) == ("before\n", "exit code -11")


def test_a_function_is_called_and_its_result_returned():
    with Sandbox("def add(a, b):\n    print('noise')\n    return (a, b, a + b)", LIMITS) as sandbox:
        outcome = sandbox.call("add", [1, 2], ENOUGH_S)
        assert (outcome.output, outcome.failure) == ("[1, 2, 3]", "")
        assert sandbox.call("sub", [1, 2], ENOUGH_S).failure == "exit code 1"
        assert sandbox.call("add", [1], ENOUGH_S).failure == "exit code 1"


@pytest.mark.parametrize(
    "ending", ["", "raise SystemExit(0)", "import os; os._exit(0)", "print(1)"]
)
def test_assertions_hold_only_if_they_were_reached(ending):
    with Sandbox(f"def f(): return 1\n{ending}", LIMITS) as sandbox:
        assert sandbox.holds("assert f() == 1", ENOUGH_S) is ("xit" not in ending)
        assert not sandbox.holds("assert f() == 2", ENOUGH_S)


def test_a_system_that_lacks_a_protection_is_refused_unless_told_so(monkeypatch, tmp_path):
    lacking = tmp_path / "lacking.py"
    lacking.write_text(
        textwrap.dedent(
            f"""
            import importlib.util
            spec = importlib.util.spec_from_file_location("jail", {jail.__file__!r})
            jail = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(jail)
            def fail(*_):
                raise OSError
            jail._allow_files = fail
            jail.main()
            """
        )
    )
    monkeypatch.setattr(jail, "__file__", str(lacking))
    with pytest.raises(UserError, match=r"lacks files .*reward\.sandbox\.allow_missing=\[files\]"):
        check_sandbox(SandboxConfig())
    with pytest.raises(UserError, match="lacks files"):
        check_sandbox(SandboxConfig(allow_missing=["calls"]))
    check_sandbox(SandboxConfig(allow_missing=["files"]))

    outside = tmp_path / "made"
    make = f"open({str(outside)!r}, 'w').write('x')"
    with pytest.raises(UserError, match="lacks files"):
        _run(make)
    assert not outside.exists(), "the program did not run"
    without = SandboxConfig(allow_missing=["files"])
    assert _run(make, limits=without).failure == ""
    # What Landlock cannot refuse before Linux 6.2, seccomp does.
    empty = f"import os\nos.open({str(outside)!r}, os.O_RDONLY | os.O_TRUNC)"
    assert _run(empty, limits=without).failure == "exit code 1"
    assert outside.read_text() == "x"


def test_limits_in_which_nothing_runs_are_refused():
    with pytest.raises(UserError, match=r"an empty program does not run .*memory_mib=1,"):
        check_sandbox(SandboxConfig(memory_mib=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpu_s": 0}, r"reward\.sandbox\.cpu_s=0 must be > 0"),
        ({"memory_mib": -1}, r"reward\.sandbox\.memory_mib=-1 must be > 0"),
        (
            {"allow_missing": ["call"]},
            r"reward\.sandbox\.allow_missing='call'.*Did you mean 'calls'",
        ),
    ],
)
def test_a_wrong_setting_names_its_key(options, message):
    with pytest.raises(UserError, match=message):
        SandboxConfig(**options)
