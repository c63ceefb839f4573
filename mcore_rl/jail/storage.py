"""The folder of a program: empty for every test, bounded in what exists, gone with its process.

Where the kernel gives every user name spaces, it is a file system in memory with a size of its own,
mounted for this process and what it forks only. The kernel then bounds whatever the files hold,
named or not, and nothing needs to be removed: it is gone when the last process is.

Elsewhere (a container or a system that refuses user name spaces) it is a folder on disk. What is
in it is counted while the program runs, with deleted files that are still open or mapped. So it can
exceed its limit until the next count.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence

from mcore_rl.jail.libc import LIBC, check

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MNT_DETACH = 2
_BLOCK_BYTES = 4096
_DELETED = " (deleted)"
_MOUNT_POINTS = ("/tmp", "/dev/shm", "/mnt", "/media")
"""Folders of every system; a mount there hides their content from the program. The first of them is
also the folder for temporary files."""


def open_storage(
    most_bytes: int, visible: Sequence[str], parent: str
) -> MemoryStorage | DiskStorage:
    """Return the best storage that this system gives.

    Args:
        most_bytes: most bytes of all files together.
        visible: folders that programs or this process read from, which a mount must not cover.
        parent: folder on disk for a folder on disk.
    """
    try:
        return MemoryStorage(most_bytes, visible)
    except OSError:
        return DiskStorage(most_bytes, parent)


class MemoryStorage:
    """A file system of `most_bytes` in memory, in name spaces of this process.

    Raises:
        OSError: if the system does not give them.
    """

    def __init__(self, most_bytes: int, visible: Sequence[str]) -> None:
        self._options = (
            f"mode=700,size={most_bytes},nr_inodes={most_bytes // _BLOCK_BYTES + 1}".encode()
        )
        self._folder = _mount_point(visible)
        _enter_name_spaces()
        self._mount()

    def fresh(self) -> str:
        """Return the folder, without anything of a test before."""
        check(LIBC.umount2(self._folder.encode(), _MNT_DETACH))
        self._mount()
        return self._folder

    def is_exceeded(self, pid: int) -> bool:
        """Whether the files of the running program are more than it may have."""
        return False  # the kernel refuses to write beyond

    def close(self) -> None:
        """Leave nothing behind."""
        pass  # goes with this process

    def _mount(self) -> None:
        flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
        check(LIBC.mount(b"tmpfs", self._folder.encode(), b"tmpfs", flags, self._options))


class DiskStorage:
    """A folder on disk whose files are counted; a file counts as a block at least."""

    def __init__(self, most_bytes: int, parent: str) -> None:
        self._most_bytes, self._parent = most_bytes, parent
        self._folder: str | None = None

    def fresh(self) -> str:
        import tempfile  # what it imports takes as long as all the rest

        self.close()
        self._folder = tempfile.mkdtemp(prefix="sandbox-", dir=self._parent)
        return self._folder

    def is_exceeded(self, pid: int) -> bool:
        total = 0
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            for size in self._sizes(pid):
                total += max(size, _BLOCK_BYTES)
                if total > self._most_bytes:
                    return True
        return False

    def close(self) -> None:
        import shutil

        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _sizes(self, pid: int) -> Iterator[int]:
        assert self._folder is not None
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    yield _bytes_of(entry.stat(follow_symlinks=False))
        inodes = set()
        descriptors = f"/proc/{pid}/fd"
        for name in os.listdir(descriptors):
            with contextlib.suppress(FileNotFoundError):
                if self._is_deleted(os.readlink(f"{descriptors}/{name}")):
                    status = os.stat(f"{descriptors}/{name}")
                    if stat.S_ISREG(status.st_mode) and status.st_ino not in inodes:
                        inodes.add(status.st_ino)
                        yield _bytes_of(status)
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6 and self._is_deleted(fields[5]):
                    # Its size is nowhere to be read, unless it is open too. The library `mmap`
                    # keeps it open; a program that does not is hiding it.
                    yield 0 if int(fields[4]) in inodes else self._most_bytes + 1

    def _is_deleted(self, path: str) -> bool:
        return path.startswith(f"{self._folder}/") and path.endswith(_DELETED)


def _bytes_of(status: os.stat_result) -> int:
    return status.st_blocks * 512


def _mount_point(visible: Sequence[str]) -> str:
    needed = [os.path.realpath(path) for path in visible]
    for folder in _MOUNT_POINTS:
        covers = any(path == folder or path.startswith(f"{folder}/") for path in needed)
        if os.path.isdir(folder) and not os.path.islink(folder) and not covers:
            return folder
    raise FileNotFoundError("no folder to mount on")


def _enter_name_spaces() -> None:
    """Become the owner of name spaces for users and mounts, under the same numbers as outside."""
    user, group = os.geteuid(), os.getegid()
    check(LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    for name, content in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
