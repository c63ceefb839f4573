"""The machine without its devices: memory, shared memory, disk, open files, the sandbox's kernel.

What is not of the standard library is imported where it is used: it may be what is missing.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
from pathlib import Path

from mcore_rl.doctor.rows import Row, Status
from mcore_rl.doctor.site import Site
from mcore_rl.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
LEAST_OPEN_FILES = 1024
"""What a run on one machine takes: sockets of its processes, files of a checkpoint."""
GOOD_OPEN_FILES = 65536
LEAST_DISK_GIB = 1.0
"""Below it not even the checkpoint of a small model fits; `mcore-rl plan` says what a run takes."""
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_PROBE_BYTES = 1 << 20


def memory(site: Site) -> list[Row]:
    """Memory of the host that is free, within the limit of a container."""
    import psutil

    found = psutil.virtual_memory()
    total, free = found.total / 2**30, found.available / 2**30
    text = f"{free:.1f} of {total:.1f} GiB free"
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        text += f", container's limit {int(limit) / 2**30:.1f} GiB"
    return [Row(name="memory", found=text, wanted="what `mcore-rl plan` says")]


def shared_memory(site: Site) -> list[Row]:
    """Room in /dev/shm, through which engines and the rewards' processes get arrays."""
    from mcore_rl.rollout.base import RolloutConfig

    bucket_mib = RolloutConfig().update_weights_bucket_mib
    least = 2 * bucket_mib / 1024  # the sender's slots: weight_sync/shared_memory.py
    wanted = f"{least:g} GiB free: two buckets of weights"
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError as error:
        found = f"{SHARED_MEMORY}: {error.strerror}"
        fix = f"mount -t tmpfs -o size=16G tmpfs {SHARED_MEMORY}"
        return [Row(name="shared-memory", found=found, wanted=wanted, status=Status.FAULT, fix=fix)]
    text = f"{usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB free"
    status, fix = Status.OK, ""
    if usage.free < least * 2**30:
        status = Status.FAULT
        fix = f"mount -o remount,size=16G {SHARED_MEMORY}  # of a container: --shm-size 16g"
        if usage.total >= least * 2**30:
            fix = f"ls -l {SHARED_MEMORY}  # shows what killed processes have left there"
    return [Row(name="shared-memory", found=text, wanted=wanted, status=status, fix=fix)]


def open_files(site: Site) -> list[Row]:
    """How many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted, status, fix = f"at least {LEAST_OPEN_FILES}", Status.OK, ""
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < LEAST_OPEN_FILES:
        status = Status.FAULT
        most = GOOD_OPEN_FILES if hard == unlimited else min(hard, GOOD_OPEN_FILES)
        fix = f"ulimit -n {most}"
        if most < LEAST_OPEN_FILES:
            fix = (
                f"docker run --ulimit nofile={GOOD_OPEN_FILES} ...  # elsewhere: nofile in "
                "/etc/security/limits.conf, and log in again"
            )
    text = "unlimited" if soft == unlimited else str(soft)
    return [
        Row(name="open-files", found=text, wanted=wanted, status=status, fix=fix, must_match=text)
    ]


def disk(site: Site) -> list[Row]:
    """Room where runs are written and where temporary files are."""
    folder = site.run_folder.absolute()
    while not folder.exists():  # a run makes it
        folder = folder.parent
    return [
        _room("disk (runs)", folder, "trainer.default_local_dir"),
        # Not what Python falls back to where it cannot write to the one that is named.
        _room(
            "disk (temporary)", Path(os.environ.get("TMPDIR") or tempfile.gettempdir()), "TMPDIR"
        ),
    ]


def _room(name: str, folder: Path, key: str) -> Row:
    wanted = f"{LEAST_DISK_GIB:g} GiB free, writable"
    try:
        usage, files = shutil.disk_usage(folder), os.statvfs(folder)
        text = f"{usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB free at {folder}"
        problem = "" if usage.free >= LEAST_DISK_GIB * 2**30 else text
        if files.f_files and not files.f_favail:
            problem = f"{text}, whose {files.f_files} inodes are all used"
    except OSError as error:
        text = problem = f"{error.strerror} at {folder}"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = f"{problem or text}: {error.strerror}"
    if not problem:
        return Row(name=name, found=text, wanted=wanted)
    fix = f"du -xh -d1 {folder}  # shows what to remove; or name another folder by {key}"
    return Row(name=name, found=problem, wanted=wanted, status=Status.FAULT, fix=fix)


def sandbox(site: Site) -> list[Row]:
    """Whether the kernel has the protections for programs that rewards of code run."""
    from mcore_rl.rewards.base import SandboxConfig
    from mcore_rl.rewards.sandbox import check_sandbox

    system = f"{platform.system()} {platform.release()}"
    wanted = "Landlock (Linux 5.13) and seccomp, for rewards of code"
    try:
        check_sandbox(SandboxConfig())
    except UserError as error:
        # Other rewards need none of it.
        return [
            Row(
                name="sandbox",
                found=f"{system}: {error}",
                wanted=wanted,
                status=Status.WARNING,
                fix="use Linux 5.13 or later; in a container, a seccomp profile with landlock_*",
                must_match="not complete",
            )
        ]
    found = f"{system}, a program runs shut in"
    return [Row(name="sandbox", found=found, wanted=wanted, must_match="complete")]
