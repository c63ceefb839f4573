"""What programs can and cannot do in the sandbox.

Nothing here is dangerous where the sandbox does not hold: it refuses to run the programs.
"""

import functools
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from mcore_rl.errors import UserError
from mcore_rl.rewards import sandbox
from mcore_rl.rewards.base import SandboxConfig
from mcore_rl.rewards.sandbox import Sandbox, check_sandbox
from tests.sandboxes import ENOUGH_S, LIMITS, ON_DISK, make_system_lack, run

pytestmark = pytest.mark.starts_processes

# Each is refused with an error of the system, and the program itself goes on.
REFUSED = {
    # files
    "reading a file": "open({outside!r} + '/secret').read()",
    "reading what the kernel says about the parent": "open(f'/proc/{{os.getppid()}}/environ')",
    "reading the parent's memory": "open(f'/proc/{{os.getppid()}}/mem', 'rb')",
    "reading its own memory as a file": "open('/proc/self/mem', 'rb')",
    "reading the users of the machine": "open('/etc/passwd')",
    "reading the package that scores it": "open({package!r} + '/code.py')",
    "listing a folder": "os.listdir({outside!r})",
    "listing the processes": "os.listdir('/proc')",
    "writing a file": "open({outside!r} + '/made', 'w')",
    "writing beside its own folder": "open('../made', 'w')",
    "writing to Python's own folder": "open(os.path.dirname(os.__file__) + '/made.py', 'w')",
    "emptying a file": "os.open({outside!r} + '/secret', os.O_RDONLY | os.O_TRUNC)",
    "emptying a file that it may read": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "deleting a file": "os.remove({outside!r} + '/secret')",
    "moving a file": "os.rename({outside!r} + '/secret', 'mine')",
    "moving its own file out": "open('a', 'w').close(); os.rename('a', {outside!r} + '/a')",
    "linking to a file": "os.link({outside!r} + '/secret', 'mine')",
    "linking by name to a file": "os.symlink({outside!r} + '/secret', 'mine')",
    "changing a mode": "os.chmod({outside!r} + '/secret', 0o777)",
    "changing an owner": "os.chown('.', 65534, 65534)",
    "changing a time": "os.utime({outside!r} + '/secret')",
    "further attributes": "os.setxattr('.', 'user.x', b'x')",
    "making a folder": "os.mkdir('folder')",
    "making a device": "os.mknod('device', 0o20666, os.makedev(1, 1))",
    "making a named pipe": "os.mkfifo('pipe')",
    "opening the disk": "open('/dev/vda', 'rb')",
    # Its own folder may be mounted on one of the two.
    "opening memory shared with all": (
        "open('/tmp/x' if os.getcwd() == '/dev/shm' else '/dev/shm/x', 'w')"
    ),
    "another root": "os.chroot('.')",
    "mounting": "call(165, b'tmpfs', b'.', b'tmpfs', 0, None)",
    "unmounting its folder": "call(166, os.getcwd().encode(), 2)",
    "watching a folder": "call(254, call(294, 0), b'/tmp', 0xfff)",
    # network and other ways out
    "opening a socket": "socket.socket()",
    "opening a datagram socket": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "opening a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW)",
    "opening a local socket": "socket.socket(socket.AF_UNIX)",
    "talking to the kernel": "socket.socket(16, socket.SOCK_RAW)",
    "a pair of datagram sockets": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "a pair that keeps records": "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
    "a pair of the network": "socket.socketpair(socket.AF_INET)",
    "sending to an address": "socket.socketpair()[0].sendto(b'x', {outside!r} + '/socket')",
    "sending to a hidden address": "socket.socketpair()[0].sendto(b'x', b'\\0socket')",
    "sending urgent bytes": "socket.socketpair()[0].send(b'x', socket.MSG_OOB)",
    "sending a descriptor": (
        "socket.send_fds(socket.socketpair()[0], [b'x'], [os.open('.', os.O_RDONLY)])"
    ),
    "finding a host": "socket.create_connection(('localhost', 80), timeout=1)",
    # processes
    "forking": "os._exit(0) if os.fork() == 0 else None",
    "forking on its own stack": "call(58)",
    "a thread that is a process": "call(56, 17, 0, 0, 0, 0)",
    "a thread in new name spaces": "call(56, 0x3D0F00 | 0x10000000, 0, 0, 0, 0)",
    "a thread that is no longer traced": "call(56, 0x3D0F00 | 0x00800000, 0, 0, 0, 0)",
    "the new way to fork": "call(435, bytes(88), 88)",
    "starting a program": "subprocess.run(['/bin/true'])",
    "becoming another program": "os.execv('/bin/true', ['true'])",
    "becoming an open program": "os.execve(os.open(sys.executable, os.O_RDONLY), ['x'], {{}})",
    "a pool of processes": "multiprocessing.Pool(2)",
    "killing its parent": "os.kill(os.getppid(), 9)",
    "killing its group": "os.killpg(0, 9)",
    "killing all it can": "os.kill(-1, 9)",
    "a handle on its parent": "os.pidfd_open(os.getppid())",
    "signals by way of a file": "fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "signals by way of a terminal": "fcntl.ioctl(0, 0x5412, b'x')",
    "limits of its parent": "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "tracing its parent": "call(101, 16, os.getppid(), 0, 0)",
    "reading the memory of its parent": "call(310, os.getppid(), 0, 0, 0, 0, 0)",
    "writing the memory of its parent": "call(311, os.getppid(), 0, 0, 0, 0, 0)",
    "an earlier turn than others": "os.nice(-5)",
    "real time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
    "other processors": "os.sched_setaffinity(0, [0])",
    # what could undo the rest
    "a ring of calls": "call(425, 8, ctypes.create_string_buffer(120))",
    "calls of another kind": "call(0x40000000 + 41, 1, 1, 0)",
    "new name spaces": "call(272, 0x10000000)",
    "living on without its parent": "call(157, 1, 0, 0, 0, 0)",
    "programs in the kernel": "call(321, 0, 0, 0)",
    "counting events": "call(298, 0, 0, -1, -1, 0)",
    "pages of the kernel's choice": "call(323, 0)",
    "keys of the kernel": "call(248, b'user', b'x', b'x', 1, -3)",
    "another user": "os.setuid(65534)",
    "another name of the machine": "socket.sethostname('x')",
    "another time": "time.clock_settime(time.CLOCK_REALTIME, 0)",
    "raising its limits": "resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, 2**40))",
    "raising what files it may open": "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))",
    # floods that end by themselves
    "memory without a file": "os.memfd_create('x')",
    "more memory than the machine has": "bytearray(10 * 2**30)",
    "more memory by mapping": "mmap.mmap(-1, 2**30)",
    "memory shared by number": "call(29, 0, 2**20, 0o1600)",
    "pinned memory": "call(149, ctypes.create_string_buffer(2**20), 2**20)",
    "many open files": "[os.dup(0) for _ in range(100)]",
    "many pipes": "[os.pipe() for _ in range(100)]",
    "a larger pipe": "fcntl.fcntl(os.pipe()[1], 1031, 2**20)",
    "a large file": "open('large', 'wb').write(bytes(3 * 2**20))",
    "a large file without content": "os.truncate(os.open('a', os.O_CREAT | os.O_RDWR), 3 * 2**20)",
    "room for a large file": "os.posix_fallocate(os.open('a', 66), 0, 3 * 2**20)",
    "writing to its input": "os.write(0, b'x')",
    "a longer input": "os.ftruncate(0, 2**20)",
    "a writable view of its input": "mmap.mmap(0, 2**12)",
}


@pytest.mark.parametrize("attempt", REFUSED)
@pytest.mark.starts_processes
def test_a_program_is_refused(attempt, storage, tmp_path):
    (tmp_path / "secret").write_text("secret")
    mode = os.stat(tmp_path / "secret").st_mode
    package = os.path.dirname(sandbox.__file__)
    program = f"""
        import ctypes, fcntl, mmap, multiprocessing, os, resource, socket, subprocess, sys
        import threading, time

        def call(*arguments):
            answer = ctypes.CDLL(None, use_errno=True).syscall(*arguments)
            if answer == -1:
                raise OSError(ctypes.get_errno(), "refused")
            return answer

        try:
            {REFUSED[attempt].format(outside=str(tmp_path), package=package)}
        except (OSError, MemoryError, RuntimeError, ValueError) as error:
            print("refused")
        else:
            print("done")
    """
    with Sandbox(textwrap.dedent(program), LIMITS) as box:
        for _ in range(2):  # so the sandbox has survived the first
            outcome = box.run_program("input", ENOUGH_S)
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
    "while True: os.sched_yield()": "time limit",
    "import atexit, time\natexit.register(time.sleep, 600)": "time limit",
    "import threading, time\nthreading.Thread(target=time.sleep, args=[600]).start()": "time limit",
    "import re\nre.match('(a+)+$', 'a' * 60 + 'b')": "time limit",
    "int('9' * 4000) ** 10**6": "time limit",
    "os.read(os.pipe()[0], 1)": "time limit",
    "import threading\nlock = threading.Lock()\nwhile True: lock.acquire()": "time limit",
    # The first thread ends, others go on.
    "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=[600]).start()\n"
    "ctypes.CDLL(None).syscall(60, 0)": "time limit",
    "while True: sys.stdout.write('x' * 2**16)": "output limit",
    "while True: os.write(1, b'x' * 2**16)": "output limit",
    "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[9]).start()": (
        "exit code 1"  # address space of the stacks
    ),
    "import threading, time\nthreading.stack_size(2**15)\n"
    "while True: threading.Thread(target=time.sleep, args=[600]).start()": "thread limit",
    "for i in range(10**9): open(str(i), 'wb').write(bytes(2**20))": "file limit",
    "for i in range(10**9): open(str(i), 'wb')": "file limit",
    "x = ['x']\nwhile True: x += x": "exit code 1",
    "x = []\nwhile True: x.append(x[:])": "exit code 1",
    "def f(): f()\nf()": "exit code 1",
    "f = lambda: sorted([1], key=lambda _: f())\nsys.setrecursionlimit(10**9)\nf()": (
        "exit code -11"  # the stack has grown to its limit
    ),
}


@functools.cache
def outcomes_at_the_time_limit(storage):
    """Return the outcomes of the programs that it stops, all at once: they wait for it anyway."""
    programs = [program for program, failure in STOPPED.items() if failure == "time limit"]
    with ThreadPoolExecutor(len(programs)) as executor:
        outcomes = executor.map(lambda program: run_with_modules(program, 1.5), programs)
        return dict(zip(programs, outcomes, strict=True))


def run_with_modules(program, timeout_s):
    return run(f"import os, sys\n{program}", timeout_s=timeout_s)


@pytest.mark.parametrize("program", STOPPED)
def test_a_program_that_would_go_on_is_stopped(program, storage):
    failure = STOPPED[program]
    if failure == "time limit":
        outcome = outcomes_at_the_time_limit(storage)[program]
    else:
        outcome = run_with_modules(program, ENOUGH_S)
    if failure == "file limit" and storage == "in memory":
        failure = "exit code 1"  # no space left on the device
    assert outcome.failure == failure
    assert len(outcome.output) <= LIMITS.output_mib * 2**20


def test_cpu_time_is_limited_apart_from_the_clock():
    limits = SandboxConfig(cpu_s=1)
    assert run("while True: pass", limits=limits).failure == "exit code -24"  # SIGXCPU
    ignoring = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(ignoring, limits=limits).failure == "exit code -9"


def test_a_program_has_the_limits_of_the_settings():
    limits = SandboxConfig(memory_mib=100, file_mib=3, output_mib=2, cpu_s=2)
    program = (
        "import resource\n"
        "for name in ('AS', 'FSIZE', 'CPU'):\n"
        "    print(resource.getrlimit(getattr(resource, f'RLIMIT_{name}'))[0])\n"
        "print('x' * 2**20 * 5)\n"
    )
    with Sandbox(program, limits) as box:
        outcome = box.run_program("", 10)
    memory, file, cpu, _ = outcome.output.split("\n", 3)
    assert (int(memory), int(file), int(cpu)) == (100 * 2**20, 3 * 2**20, 2)
    assert outcome.failure == "output limit"
    assert len(outcome.output) == 2 * 2**20


def test_privileges_are_given_up():
    """Of this user's, whatever they are: a program has no capability and gains none."""
    code = """
        from mcore_rl.jail import confinement
        confinement._drop_privileges()
        print(open("/proc/self/status").read())
    """
    status = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    none = "0" * 16
    assert [fields[name] for name in ("CapEff", "CapPrm", "CapInh")] == [none] * 3
    assert fields["NoNewPrivs"] == "1"


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
    "exit()": ("print(1)\nexit()", "", "1\n"),
    "exit(0)": ("print(1)\nif True:\n    exit(0)\nprint(2)", "", "1\n"),
    "quit()": ("print(1)\nquit()", "", "1\n"),
    "arguments": ("import sys\nprint(sys.argv)", "", "['program.py']\n"),
    "output at the end": ("import atexit\natexit.register(print, 1)", "", "1\n"),
    "another output": (
        "import io, sys\nout, sys.stdout = sys.stdout, io.StringIO()\nout.write('1\\n')",
        "",
        "1\n",
    ),
    "output closed": ("import sys\nprint(1)\nsys.stdout.close()", "", "1\n"),
    "a thread with a deep stack": (
        "import sys, threading\nsys.setrecursionlimit(10**7)\nthreading.stack_size(2**27)\n"
        "def f(n): return n and 1 + max([n], key=lambda _: f(n - 1)) - n + f(0)\n"
        "threading.Thread(target=lambda: print(f(20000))).start()",
        "",
        "1\n",
    ),
    "a deep stack": (
        "import sys\nsys.setrecursionlimit(10**7)\n"
        "def f(n): return n and 1 + max([n], key=lambda _: f(n - 1)) - n + f(0)\nprint(f(20000))",
        "",
        "1\n",
    ),
    "a pool of threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(16) as pool: print(sum(pool.map(len, ['a'] * 100)))",
        "",
        "100\n",
    ),
    "threads that are not waited for": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print(1))).start()",
        "",
        "1\n",
    ),
    "a view of the input": (
        "import mmap\nprint(mmap.mmap(0, 0, access=mmap.ACCESS_READ)[:3])",
        "abcd",
        "b'abc'\n",
    ),
    "temporary files": (
        "import tempfile\nwith tempfile.TemporaryFile() as a, tempfile.NamedTemporaryFile() as b,"
        " tempfile.SpooledTemporaryFile() as c:\n    for f in (a, b, c):\n"
        "        f.write(bytes(2**19)); f.seek(0); print(len(f.read()))",
        "",
        "524288\n" * 3,
    ),
    "a temporary file that is mapped": (
        "import mmap, os, tempfile\nwith tempfile.TemporaryFile() as f:\n"
        "    f.write(bytes(2**19)); f.flush()\n"
        "    m = mmap.mmap(f.fileno(), 0); m[:3] = b'abc'; f.seek(0); print(f.read(3))",
        "",
        "b'abc'\n",
    ),
    "files over and over": (
        "import os\nfor i in range(20):\n    open('a', 'wb').write(bytes(2**20))\n"
        "    os.replace('a', 'b')\n    os.remove('b')\nprint(os.listdir())",
        "",
        "[]\n",
    ),
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
def test_an_ordinary_program_runs(name, storage):
    program, stdin, output = ORDINARY[name]
    outcome = run(program, stdin)
    assert (outcome.output, outcome.failure) == (output, "")


@pytest.mark.parametrize(
    "program",
    ["1 / 0", "def f(:", "raise SystemExit(3)", "raise SystemExit('no')", "\x00", "\ud800"],
)
def test_a_program_that_fails_has_an_exit_code(program):
    assert run(program).failure == "exit code 1"


def test_a_crash_is_the_programs_only():
    outcome = run("print('before', flush=True)\nimport ctypes\nctypes.string_at(0)")
    assert (outcome.output, outcome.failure) == ("before\n", "exit code -11")


def test_a_function_is_called_and_its_result_returned():
    with Sandbox("def add(a, b):\n    print('noise')\n    return (a, b, a + b)", LIMITS) as box:
        outcome = box.call("add", [1, 2], ENOUGH_S)
        assert (outcome.output, outcome.failure) == ("[1, 2, 3]", "")
        assert box.call("sub", [1, 2], ENOUGH_S).failure == "exit code 1"
        assert box.call("add", [1], ENOUGH_S).failure == "exit code 1"


@pytest.mark.parametrize(
    "ending", ["", "raise SystemExit(0)", "import os; os._exit(0)", "print(1)"]
)
def test_assertions_hold_only_if_they_were_reached(ending):
    with Sandbox(f"def f(): return 1\n{ending}", LIMITS) as box:
        assert box.holds("assert f() == 1", ENOUGH_S) is ("xit" not in ending)
        assert not box.holds("assert f() == 2", ENOUGH_S)


def test_a_system_that_lacks_a_protection_is_refused_unless_told_so(monkeypatch, tmp_path):
    make_system_lack(monkeypatch, ON_DISK, "confinement._allow_files = refuse")
    with pytest.raises(UserError, match=r"lacks files .*reward\.sandbox\.allow_missing=\[files\]"):
        check_sandbox(SandboxConfig())
    with pytest.raises(UserError, match="lacks files"):
        check_sandbox(SandboxConfig(allow_missing=["calls"]))
    check_sandbox(SandboxConfig(allow_missing=["files"]))

    outside = tmp_path / "made"
    make = f"open({str(outside)!r}, 'w').write('x')"
    with pytest.raises(UserError, match="lacks files"):
        run(make)
    assert not outside.exists(), "the program did not run"
    without = SandboxConfig(allow_missing=["files"])
    assert run(make, limits=without).failure == ""
    # What Landlock cannot refuse before Linux 6.2, seccomp does.
    empty = f"import os\nos.open({str(outside)!r}, os.O_RDONLY | os.O_TRUNC)"
    assert run(empty, limits=without).failure == "exit code 1"
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
