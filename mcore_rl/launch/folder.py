"""A folder in the temporary directory that only this user may enter. It is removed with the run."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

_PREFIX = "mcore_rl-"
_OWNER = "owner"
_LONGEST = 60
"""Most characters of the temporary directory's path: a socket's path has at most 107 in all."""


class PrivateFolder:
    """A folder with mode 0700; `remove` removes it.

    The folder of a killed process is removed by the next process that makes one: its lock is free
    then.
    """

    def __init__(self) -> None:
        base = tempfile.gettempdir()
        base = base if len(base) <= _LONGEST else "/tmp"
        _sweep(Path(base))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self._lock = os.open(self.path / _OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def is_private(folder: Path) -> bool:
    """Return whether the folder is this user's and nobody else may enter it."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    is_closed = stat.S_IMODE(found.st_mode) & 0o077 == 0
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and is_closed


def _sweep(base: Path) -> None:
    for folder in base.glob(f"{_PREFIX}*"):
        if not is_private(folder):
            continue
        try:
            lock = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # it is being made, or removed
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
