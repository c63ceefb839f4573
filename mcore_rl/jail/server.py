"""The server of one sandbox: runs a program on one test after another, each in a fresh process.

It takes a JSON line with the program and its limits, then one line per test, and answers each with
a line. Every test runs in a fork of this process, which gives up everything before the first line
of the program runs (`program.py`, `confinement.py`).

This process watches it: wall time, size of its output, number of its threads, and its files where
the kernel does not bound them. It knows no expected results, so a program finds none in its memory.
When the other end goes away, however it ended, the program is killed and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import select
import signal
import time

from mcore_rl.jail.confinement import folders_to_read
from mcore_rl.jail.program import be_the_program
from mcore_rl.jail.storage import DiskStorage, MemoryStorage, open_storage

_LOOK_S = 0.02
_MOST_THREADS = 64
"""Of a program, itself included."""


def main() -> None:
    """Answer every line of standard input on standard output."""
    commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    if not (first := commands.readline()):
        return
    job = json.loads(first)
    visible = [*folders_to_read(job["site_packages"]), job["package_root"]]
    storage = open_storage(job["limits"]["file_bytes"], visible, job["temporary_folder"])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, before anything else
    gc.freeze()  # a collection in a fork copies no pages of what is here already
    for line in commands:
        answer = _run(job, json.loads(line), storage, commands.fileno())
        with contextlib.suppress(BrokenPipeError):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    storage.close()
    os._exit(0)  # nothing is left to do, and the interpreter would take its time


def _run(job: dict, test: dict, storage: MemoryStorage | DiskStorage, commands: int) -> dict:
    """Run one test in a fork and return what it wrote and how it ended."""
    if test["kind"] in ("values", "verdict"):
        import mcore_rl.jail.plain_data  # noqa: F401  here, since a program cannot read this folder
    folder = storage.fresh()
    reader, writer = os.pipe()
    missing_reader, missing_writer = os.pipe()
    given = _sealed(test["stdin"].encode("utf-8", "replace"))
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = be_the_program(job, test, folder, given, writer, missing_writer, server)
        finally:
            os._exit(code)
    for descriptor in (given, writer, missing_writer):
        os.close(descriptor)
    # Written and closed before the first line of the program, which so cannot imitate it.
    with os.fdopen(missing_reader) as file:
        missing = file.read()
    try:
        if missing:
            os.waitpid(pid, 0)
            return {"missing": missing.split()}
        return _watch(job["limits"], storage, pid, reader, commands, test["timeout_s"])
    finally:
        os.close(reader)


def _sealed(content: bytes) -> int:
    """Return the descriptor of a file that holds `content` and can neither grow nor change."""
    file = os.memfd_create("stdin", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    for start in range(0, len(content), 2**30):  # a single write may fall short beyond 2 GiB
        os.write(file, content[start : start + 2**30])
    os.lseek(file, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def _watch(
    limits: dict,
    storage: MemoryStorage | DiskStorage,
    pid: int,
    reader: int,
    commands: int,
    timeout_s: float,
) -> dict:
    """Return the output, and why the program was stopped if it did not end by itself."""
    output, stopped = bytearray(), ""
    until = time.monotonic() + timeout_s
    process = os.pidfd_open(pid)
    waiting_for = [reader, process, commands]
    while not stopped:
        ready, _, _ = select.select(waiting_for, [], [], _LOOK_S)
        if reader in ready:
            piece = os.read(reader, 2**16)
            output += piece
            if not piece:
                waiting_for.remove(reader)
        elif process in ready:
            break
        if commands in ready:  # no test comes before the answer to this one
            stopped = "abandoned"
        elif process not in ready and time.monotonic() > until:
            stopped = "time limit"
        elif len(output) > limits["output_bytes"]:
            stopped = "output limit"
        elif _num_threads(pid) > _MOST_THREADS:
            stopped = "thread limit"
        elif storage.is_exceeded(pid):
            stopped = "file limit"
    os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    status = os.waitpid(pid, 0)[1]
    os.close(process)
    return {
        "output": output[: limits["output_bytes"]].decode("utf-8", "replace"),
        "stopped": stopped,
        "exit_code": os.waitstatus_to_exitcode(status),
    }


def _num_threads(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            after_the_name = file.read().rpartition(b")")[2]
    except OSError:  # it has just ended
        return 0
    return int(after_the_name.split()[17])
