"""The program of one sandbox: `python -I -S jail.py`, started by `sandbox.py`.

It takes a JSON line with the program and its limits, then one line per test, and answers each with
a line. Every test runs in a fork of this process, which gives up everything before the first line
of the program runs, by means that need no privileges and hold in containers too:

- Landlock: reads Python's own folders, reads and writes its own folder, opens nothing else;
- seccomp: the system calls of a computation and no others. No sockets, no processes, no threads, no
  signals to others, no change of modes or owners;
- resource limits: address space, CPU time, file size, open files;
- no capabilities, an empty environment, and death with its parent.

This process watches it: wall time, size of its output and of its folder. It knows no expected
results, so a program finds none in its memory. It imports the standard library only.

Sources: Linux's userspace-api/landlock.rst and seccomp_filter.rst; numbers of the calls from
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (Arm).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
import types

_LIBC = ctypes.CDLL(None, use_errno=True)

# Call: (x86-64, Arm); None where there is no such call.
_CALLS = {
    # files and pipes
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "lseek": (8, 62),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "pipe": (22, None),
    "pipe2": (293, 59), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "unlink": (87, None), "unlinkat": (263, 35),
    "readlink": (89, None), "readlinkat": (267, 78), "fadvise64": (221, 223),
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233),
    # itself
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "exit": (60, 93), "exit_group": (231, 94), "arch_prctl": (158, None), "futex": (202, 98),
    "set_tid_address": (218, 96), "set_robust_list": (273, 99), "rseq": (334, 293),
    "restart_syscall": (219, 128), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "uname": (63, 160),
    "sysinfo": (99, 179), "getrandom": (318, 278),
    # time and waiting
    "select": (23, None), "pselect6": (270, 72), "poll": (7, None), "ppoll": (271, 73),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "gettimeofday": (96, 169), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "time": (201, None), "times": (100, 153),
    "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None),
    # an event loop wakes itself through a pair of sockets, which lead nowhere else
    "socketpair": (53, 199), "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210),
    # allowed by their arguments only, below
    "ioctl": (16, 29), "fcntl": (72, 25), "prlimit64": (302, 261), "openat": (257, 56),
}  # fmt: skip

# Position of an argument and the values it may have. What is left out of fcntl and ioctl sets who
# gets a signal when a file is ready: a way to signal others.
_ARGUMENTS = {
    "ioctl": (1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),  # terminal?, bytes left, flags
    "fcntl": (1, (0, 1, 2, 3, 4, 1030)),  # duplicate, flags of descriptor and file
    "prlimit64": (0, (0,)),  # of this process
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Instructions of the classic Berkeley packet filter, and where the call's data are.
_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EACCES, 0x80000000

# Rights of Landlock on files.
_WRITE, _READ, _LIST, _REMOVE, _MAKE, _TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_NEWEST_NUM_RIGHTS = 16

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _CAPSET = {
    "x86_64": (444, 445, 446, 126),
    "aarch64": (444, 445, 446, 91),
}.get(platform.machine(), (-1, -1, -1, -1))
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38


def main() -> None:
    """Answer every line of standard input on standard output."""
    commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    _die_with_parent()
    job = json.loads(commands.readline())
    sys.path += job["site_packages"]
    os.chdir(job["folder"])
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, before anything else
    for line in commands:
        answers.write(json.dumps(_run(job, json.loads(line))) + "\n")
        answers.flush()


def _run(job: dict, test: dict) -> dict:
    """Run one test in a fork and return what it wrote and how it ended."""
    reader, writer = os.pipe()
    missing_reader, missing_writer = os.pipe()
    given = os.memfd_create("stdin")
    os.write(given, test["stdin"].encode("utf-8", "replace"))
    os.lseek(given, 0, os.SEEK_SET)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _be_the_program(job, test, given, writer, missing_writer)
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
        return _watch(job["limits"], job["folder"], pid, reader, test["timeout_s"])
    finally:
        os.close(reader)


def _watch(limits: dict, folder: str, pid: int, reader: int, timeout_s: float) -> dict:
    """Return the output, and why the program was stopped if it did not end by itself."""
    output, stopped = bytearray(), ""
    until = time.monotonic() + timeout_s
    process = os.pidfd_open(pid)
    waiting_for = [reader, process]
    while not stopped:
        ready, _, _ = select.select(waiting_for, [], [], 0.02)
        if reader in ready:
            piece = os.read(reader, 2**16)
            output += piece
            if not piece:
                waiting_for.remove(reader)
        elif process in ready:
            break
        if process not in ready and time.monotonic() > until:
            stopped = "time limit"
        elif len(output) > limits["output_bytes"]:
            stopped = "output limit"
        elif _size_of(folder, limits) > limits["file_bytes"]:
            stopped = "file limit"
    os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    status = os.waitpid(pid, 0)[1]
    os.close(process)
    return {
        "output": output[: limits["output_bytes"]].decode("utf-8", "replace"),
        "stopped": stopped,
        "exit_code": os.waitstatus_to_exitcode(status),
    }


def _size_of(folder: str, limits: dict) -> int:
    """Return the bytes of the files in `folder`, which has no folders in it; a file counts as a
    block at least."""
    size = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                size += max(entry.stat(follow_symlinks=False).st_blocks * 512, 4096)
            if size > limits["file_bytes"]:
                break
    return size


def _be_the_program(job: dict, test: dict, stdin: int, output: int, missing: int) -> int:
    """Give up all rights, run the program on the test and return its exit code.

    Does not run it where protections are missing, and writes their names to `missing`.
    """
    null = os.open(os.devnull, os.O_RDWR)
    is_program = test["kind"] == "program"
    os.dup2(stdin, 0)
    os.dup2(output if is_program else null, 1)
    os.dup2(null, 2)
    output, missing = os.dup2(output, 64), os.dup2(missing, 65)  # out of the way
    os.closerange(3, 64)
    os.closerange(66, 256)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    lacking = restrict(job["limits"], job["folder"], job["site_packages"])
    refused = [name for name in lacking if name not in job["allow_missing"]]
    os.write(missing, " ".join(refused).encode())
    os.close(missing)
    if refused:
        return 1
    if is_program:
        os.close(output)
    try:
        _execute(job["source"], test, output)
        sys.stdout.flush()
    except SystemExit as error:
        sys.stdout.flush()
        return 0 if error.code in (None, 0) else 1
    return 0


def _execute(source: str, test: dict, output: int) -> None:
    """Run the program; then, by the kind of test, call its function or run the assertions."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(source, "program.py", "exec"), module.__dict__)
    if test["kind"] == "call":
        holder = module.Solution() if hasattr(module, "Solution") else module
        result = getattr(holder, test["function"])(*test["arguments"])
        _write(output, json.dumps(result).encode())
    elif test["kind"] == "assertions":
        exec(compile(test["assertions"], "tests.py", "exec"), module.__dict__)
        _write(output, test["token"].encode())


def _write(descriptor: int, content: bytes) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def restrict(limits: dict, folder: str, site_packages: list[str]) -> list[str]:
    """Give up all rights but those of a computation; return the protections that failed."""
    for name, most in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(name, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    os.environ.clear()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy starts threads otherwise
    _die_with_parent()
    missing = []
    for name, protect in (
        ("privileges", _drop_privileges),
        ("files", lambda: _allow_files(folder, site_packages)),
        ("calls", _allow_calls),
    ):
        try:
            protect()
        except OSError:
            missing.append(name)
    return missing


def _die_with_parent() -> None:
    _check(_LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))


def _drop_privileges() -> None:
    """Give up all capabilities, and gain none by starting a program."""
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    version_3_of_this_process = struct.pack("Ii", 0x20080522, 0)
    none_of_any = bytes(24)
    _check(_LIBC.syscall(_CAPSET, version_3_of_this_process, none_of_any))


def _allow_files(folder: str, site_packages: list[str]) -> None:
    """Landlock: read Python's folders, read and write `folder`, open nothing else."""
    version = _check(_LIBC.syscall(_CREATE_RULESET, None, 0, 1))
    handled = (1 << _NUM_RIGHTS.get(version, _NEWEST_NUM_RIGHTS)) - 1
    ruleset = _check(_LIBC.syscall(_CREATE_RULESET, struct.pack("Q", handled), 8, 0))
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    rules = dict.fromkeys([*libraries, f"{sys.base_prefix}/lib", *site_packages], _READ | _LIST)
    rules["/dev/null"] = _READ | _WRITE
    rules["/dev/urandom"] = _READ
    rules[folder] = _READ | _LIST | _WRITE | _MAKE | _REMOVE | _TRUNCATE
    for path, rights in rules.items():
        if os.path.exists(path):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", rights & handled, descriptor)
            _check(_LIBC.syscall(_ADD_RULE, ruleset, 1, rule, 0))
            os.close(descriptor)
    _check(_LIBC.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow_calls() -> None:
    """Seccomp: refuse every call that is not listed, with EACCES."""
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(f"no list of the system calls of {platform.machine()}")
    column, architecture = _ARCHITECTURES[platform.machine()]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for name, numbers in _CALLS.items():
        if (number := numbers[column]) is not None:
            verdict = _verdict(name)
            program += [(_EQUAL, 0, len(verdict), number), *verdict]
    program.append((_RETURN, 0, 0, _REFUSE))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HL", len(program), ctypes.addressof(code))
    _check(_LIBC.prctl(_PR_SET_SECCOMP, 2, header, 0, 0))


def _verdict(name: str) -> list[tuple[int, int, int, int]]:
    """Return the instructions that decide about a call; they end in a return."""
    allow, refuse = (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)
    if name == "openat":  # opened for reading, a file can still be truncated before Linux 6.2
        flags = (_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * 2)
        masked = (_AND, 0, 0, os.O_TRUNC | os.O_ACCMODE)
        return [flags, masked, (_EQUAL, 0, 1, os.O_TRUNC), refuse, allow]
    if name in _ARGUMENTS:
        position, values = _ARGUMENTS[name]
        tests = [line for value in values for line in ((_EQUAL, 0, 1, value), allow)]
        return [(_LOAD, 0, 0, _FIRST_ARGUMENT + 8 * position), *tests, refuse]
    return [allow]


def _check(result: int) -> int:
    """Return what a call into C returned.

    Raises:
        OSError: if that is -1.
    """
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


if __name__ == "__main__":
    main()
