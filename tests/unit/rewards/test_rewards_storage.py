"""The files of programs: what exists is bounded, whether it has a name or not, and nothing is left.

Both kinds of storage are tested: the private file system, and the folder on disk for systems that
give no name spaces.
"""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mcore_rl.errors import RunError
from mcore_rl.rewards import sandbox
from mcore_rl.rewards.sandbox import Sandbox
from tests.sandboxes import ENOUGH_S, LIMITS, ON_DISK, SERVE_WITH, run

pytestmark = pytest.mark.starts_processes

# Each keeps 1 MiB more, 32 times, without a name at the end.
HIDDEN = {
    "deleted and open": "kept.append(made(i)); os.remove(i)",
    "deleted and mapped": "kept.append(mapped(made(i))); os.remove(i); os.close(last)",
    "deleted and mapped for reading": (
        "kept.append(mapped(made(i), 1, 2)); os.remove(i); os.close(last)"
    ),
    "without a name": "kept.append(filled(os.open('.', os.O_TMPFILE | os.O_RDWR)))",
    "without a name and mapped": (
        "kept.append(mapped(filled(os.open('.', os.O_TMPFILE | os.O_RDWR)))); os.close(last)"
    ),
    "replaced": "kept.append(made(i)); os.replace(i, 'one')",
    "replaced and mapped": "kept.append(mapped(made(i))); os.close(last); os.replace(i, 'one')",
    "filled through a mapping": (
        "f = os.open(i, os.O_CREAT | os.O_RDWR); os.truncate(f, 2**20); m = mmap.mmap(f, 2**20);"
        "m[:] = b'x' * 2**20; kept.append(m); os.remove(i); os.close(f)"
    ),
    "many small": "[open(i + str(j), 'w').write('x') for j in range(256)]",
}


@pytest.mark.parametrize("how", HIDDEN)
def test_what_has_no_name_counts_too(how, storage):
    program = f"""
        import ctypes, mmap, os, time
        C = ctypes.CDLL(None)
        C.mmap.restype = ctypes.c_void_p
        kept, last = [], None

        def filled(descriptor):
            global last
            last = descriptor
            for _ in range(16):  # no write is cut off by the end of the room
                os.write(descriptor, b"x" * 2**16)
            return descriptor

        def made(name):
            return filled(os.open(name, os.O_CREAT | os.O_RDWR))

        def mapped(descriptor, protection=3, flags=1):
            address = C.mmap(None, ctypes.c_size_t(4096), protection, flags, descriptor, 0)
            assert address not in (None, 2**64 - 1)
            return address

        try:
            for number in range(32):
                i = str(number)
                {HIDDEN[how]}
                print(number + 1, flush=True)
        except OSError as error:
            print(error.strerror)
        else:
            time.sleep(600)
    """
    outcome = run(program)
    if storage == "on disk":
        assert outcome.failure == "file limit"
    elif how == "filled through a mapping":
        assert outcome.failure == "exit code -7"  # SIGBUS: there is no room for the page
    else:
        assert outcome.output.endswith("No space left on device\n")
    if storage == "in memory":
        kept = [line for line in outcome.output.splitlines() if line.isdigit()]
        assert len(kept) <= LIMITS.file_mib


def test_a_folder_does_not_outlive_its_test(storage):
    program = """
        import os
        print(os.listdir())
        for name in ("a", "b"):
            open(name, "w").write("x")
        os.remove("b")
    """
    with Sandbox(textwrap.dedent(program), LIMITS) as box:
        outcomes = [box.run_program("", ENOUGH_S) for _ in range(3)]
    assert [(o.output, o.failure) for o in outcomes] == [("[]\n", "")] * 3


def test_programs_side_by_side_do_not_see_each_other(storage):
    program = "import os\nopen('file', 'x').write('x')\nprint(os.listdir())\ninput()"
    with Sandbox(program, LIMITS) as one, Sandbox(program, LIMITS) as other:
        for box in (one, other):
            assert box.run_program("\n", ENOUGH_S).output == "['file']\n"


def test_nothing_of_a_program_is_left(storage):
    program = """
        import os
        print(os.getcwd(), os.getpid(), flush=True)
        open("file of a program", "w").write("x")
        while True:  # until it is stopped
            print("x" * 2**16, flush=True)
    """
    outcome = run(program)
    assert outcome.failure == "output limit"
    folder, pid = outcome.output.splitlines()[0].split()
    assert not os.path.exists(f"{folder}/file of a program")
    assert storage == "in memory" or not os.path.exists(folder)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_package_among_temporary_files_still_finds_itself(storage, tmp_path, monkeypatch):
    """The private file system covers none of the folders that are read."""
    package = Path(sandbox.__file__).parents[1]
    copied = tmp_path / "mcore_rl"
    shutil.copytree(package / "jail", copied / "jail")
    (copied / "__init__.py").touch()
    monkeypatch.setattr(sandbox, "_PACKAGE_ROOT", str(tmp_path))
    with Sandbox("def f(): return {1}", LIMITS) as box:
        outcome = box.evaluate([("eval", "f()")], ENOUGH_S)
    assert (outcome.output, outcome.failure) == ('[["set", [1]]]', "")


_SCORER = """
import sys
from mcore_rl.rewards import sandbox
from mcore_rl.rewards.base import SandboxConfig
sandbox._SERVE = {serve!r}
program = '''
import os, sys, time
open("file", "w").write("x")
print("x" * 2**20, flush=True)  # fills the pipe
time.sleep(600)
'''
with sandbox.Sandbox(program, SandboxConfig()) as box:
    print(box._start().pid, flush=True)
    box.run_program("", 600.0)
"""


def _wait_until(condition):
    until = time.monotonic() + ENOUGH_S
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def _children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []


def test_a_scorer_that_is_killed_leaves_no_folder_and_no_process(storage, tmp_path):
    serve = SERVE_WITH.format(ON_DISK if storage == "on disk" else "")
    scorer = subprocess.Popen(
        [sys.executable, "-c", _SCORER.format(serve=serve)],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    assert scorer.stdout is not None
    server = int(scorer.stdout.readline())
    _wait_until(lambda: _children(server))
    if storage == "on disk":
        _wait_until(lambda: any(files for _, _, files in os.walk(tmp_path)))
    [program] = _children(server)
    os.killpg(scorer.pid, signal.SIGKILL)  # as the pool does
    scorer.wait()
    for pid in (server, program):
        _wait_until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"))
    assert os.listdir(tmp_path) == []


# The second has only threads left that nobody waits for.
@pytest.mark.parametrize(
    "end", ["time.sleep(600)", "ctypes.CDLL(None).syscall(60, 0)"], ids=["asleep", "first ended"]
)
def test_a_program_ends_with_its_server(end):
    program = f"""
        import ctypes, os, threading, time
        threading.Thread(target=time.sleep, args=[600]).start()
        {end}
    """
    with ThreadPoolExecutor() as executor, Sandbox(textwrap.dedent(program), LIMITS) as box:
        server = box._start()
        outcome = executor.submit(box.run_program, "", 600.0)
        _wait_until(lambda: _children(server.pid))
        [pid] = _children(server.pid)
        _wait_until(lambda: len(os.listdir(f"/proc/{pid}/task")) == 2 or end != "time.sleep(600)")
        time.sleep(1.0)  # so that the first thread has ended
        server.kill()
        with pytest.raises(RunError, match="the sandbox ended"):
            outcome.result()
    _wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
