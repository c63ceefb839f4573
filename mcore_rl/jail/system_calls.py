"""Seccomp: the system calls of a computation and no others.

No sockets that lead anywhere, no processes, no signals to others, no change of modes or owners.
Threads are allowed; a thread is a `clone` with the flags of the C library's, to the bit.

Sources: Linux's userspace-api/seccomp_filter.rst; numbers of the calls from
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (Arm).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from mcore_rl.jail.libc import LIBC, check

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
    # an event loop wakes itself through a pair of sockets
    "socketpair": (53, 199), "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210),
    # a few of their many uses, below
    "ioctl": (16, 29), "fcntl": (72, 25), "prlimit64": (302, 261), "openat": (257, 56),
    "clone": (56, 220),
}  # fmt: skip

_EVERY_BIT = 0xFFFFFFFF
_UNNAMED = [(4, "low", _EVERY_BIT, (0,)), (4, "high", _EVERY_BIT, (0,))]

# What the arguments of a call must be, all of it: position, half, mask, values under the mask.
_CONDITIONS = {
    # What is left out of fcntl and ioctl sets who gets a signal when a file is ready: a way to
    # signal others.
    "ioctl": [(1, "low", _EVERY_BIT, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451))],
    "fcntl": [(1, "low", _EVERY_BIT, (0, 1, 2, 3, 4, 1030))],  # duplicate, flags
    "prlimit64": [(0, "low", _EVERY_BIT, (0,))],  # of this process
    # Opened for reading, a file can still be truncated before Linux 6.2.
    "openat": [
        (
            2,
            "low",
            os.O_TRUNC | os.O_ACCMODE,
            (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_TRUNC | os.O_WRONLY, os.O_TRUNC | os.O_RDWR),
        )
    ],
    # A stream is bound to its other end; a datagram would go to any address.
    "socketpair": [(0, "low", _EVERY_BIT, (1,)), (1, "low", 0xF, (1,))],
    # No address and no urgent byte: MSG_DONTWAIT and MSG_NOSIGNAL only.
    "sendto": [(3, "low", _EVERY_BIT, (0, 0x40, 0x4000, 0x4040)), *_UNNAMED],
    "recvfrom": [(3, "low", _EVERY_BIT, (0, 0x40))],
    # CLONE_VM, _FS, _FILES, _SIGHAND, _THREAD, _SYSVSEM, _SETTLS, _PARENT_SETTID, _CHILD_CLEARTID;
    # musl adds _DETACHED.
    "clone": [(0, "low", _EVERY_BIT, (0x3D0F00, 0x7D0F00))],
}

# The filter cannot look at the flags of `clone3`, which lie in memory; told that there is no such
# call, the C library takes `clone`.
_CLONE3 = 435

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Instructions of the classic Berkeley packet filter, and where the call's data are.
_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE, _UNKNOWN = 0x00050000 | errno.EACCES, 0x00050000 | errno.ENOSYS
_PR_SET_SECCOMP = 22

_Instruction = tuple[int, int, int, int]


def allow_calls() -> None:
    """Refuse every call that is not listed, with EACCES, from now on.

    Raises:
        OSError: if the system cannot do it.
    """
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(f"no list of the system calls of {machine}")
    column, architecture = _ARCHITECTURES[machine]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _UNKNOWN),
    ]
    for name, numbers in _CALLS.items():
        if (number := numbers[column]) is not None:
            verdict = _verdict(name)
            program += [(_EQUAL, 0, len(verdict), number), *verdict]
    program.append((_RETURN, 0, 0, _REFUSE))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HL", len(program), ctypes.addressof(code))
    check(LIBC.prctl(_PR_SET_SECCOMP, 2, header, 0, 0))


def _verdict(name: str) -> list[_Instruction]:
    """Return the instructions that decide about a call; they end in a return."""
    instructions: list[_Instruction] = []
    for position, half, mask, values in _CONDITIONS.get(name, ()):
        offset = _FIRST_ARGUMENT + 8 * position + (4 if half == "high" else 0)
        instructions += [(_LOAD, 0, 0, offset), (_AND, 0, 0, mask)]
        for index, value in enumerate(values):
            past_the_refusal = len(values) - index
            instructions.append((_EQUAL, past_the_refusal, 0, value))
        instructions.append((_RETURN, 0, 0, _REFUSE))
    return [*instructions, (_RETURN, 0, 0, _ALLOW)]
