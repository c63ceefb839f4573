"""The rights of a program, given up for ever by means that need no privileges:

- Landlock: reads Python's own folders, reads and writes its own folder, opens nothing else;
- seccomp: the system calls of a computation and no others (`system_calls.py`);
- resource limits: address space, CPU time, file size, open files;
- no capabilities, an empty environment, and death with its parent.

Source: Linux's userspace-api/landlock.rst.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping, Sequence

from mcore_rl.jail.libc import LIBC, check
from mcore_rl.jail.system_calls import allow_calls

# Rights of Landlock on files.
_WRITE, _READ, _LIST, _REMOVE, _MAKE, _TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_NEWEST_NUM_RIGHTS = 16

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _CAPSET = {
    "x86_64": (444, 445, 446, 126),
    "aarch64": (444, 445, 446, 91),
}.get(os.uname().machine, (-1, -1, -1, -1))
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


def restrict(limits: Mapping[str, int], folder: str, site_packages: Sequence[str]) -> list[str]:
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
    _allow_a_deep_stack(limits["memory_bytes"])
    os.environ.clear()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy starts one per CPU otherwise, with its memory
    missing = []
    for name, protect in (
        ("privileges", _drop_privileges),
        ("files", lambda: _allow_files(folder, site_packages)),
        ("calls", allow_calls),
    ):
        try:
            protect()
        except OSError:
            missing.append(name)
    return missing


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent, the process with that id, ends."""
    check(LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def _allow_a_deep_stack(memory_bytes: int) -> None:
    """Let the stack grow like other memory, as judges do, where the system allows it."""
    most = resource.getrlimit(resource.RLIMIT_STACK)[1]
    wanted = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, most))


def _drop_privileges() -> None:
    """Give up all capabilities, and gain none by starting a program."""
    check(LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    version_3_of_this_process = struct.pack("Ii", 0x20080522, 0)
    none_of_any = bytes(24)
    check(LIBC.syscall(_CAPSET, version_3_of_this_process, none_of_any))


def _allow_files(folder: str, site_packages: Sequence[str]) -> None:
    """Landlock: read Python's folders, read and write `folder`, open nothing else."""
    version = check(LIBC.syscall(_CREATE_RULESET, None, 0, 1))
    handled = (1 << _NUM_RIGHTS.get(version, _NEWEST_NUM_RIGHTS)) - 1
    ruleset = check(LIBC.syscall(_CREATE_RULESET, struct.pack("Q", handled), 8, 0))
    rules = dict.fromkeys(folders_to_read(site_packages), _READ | _LIST)
    rules["/dev/null"] = _READ | _WRITE
    rules["/dev/urandom"] = _READ
    rules[folder] = _READ | _LIST | _WRITE | _MAKE | _REMOVE | _TRUNCATE
    for path, rights in rules.items():
        if os.path.exists(path):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", rights & handled, descriptor)
            check(LIBC.syscall(_ADD_RULE, ruleset, 1, rule, 0))
            os.close(descriptor)
    check(LIBC.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def folders_to_read(site_packages: Sequence[str]) -> list[str]:
    """Return the folders that Python and its libraries are read from."""
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    return [*libraries, f"{sys.base_prefix}/lib", *site_packages]
