"""An output folder that appears complete or not at all, and whose writing can be resumed.

Files are written into `<folder>.partial`, each beside its name and flushed before it takes it, so a
file under its name is finished. At the end the folder is renamed. Killed at any moment, the same
task started again finds the finished files; another task starts from nothing. What the task is lies
beside it, in `<folder>.partial.json`, until the folder has its name: so the folder holds nothing
but the output, and the file that a kill right then leaves beside it does no harm.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from mcore_rl.durable_files import sync, write_whole
from mcore_rl.errors import UserError, require

_TMP = ".tmp"


class StagedFolder:
    """What will be `folder`, open for one process at a time.

    Args:
        folder: must not exist, or be empty.
        task: everything that the content of the files follows from, as JSON.

    Raises:
        UserError: if the folder is there, or another process is making it.
    """

    def __init__(self, folder: str | Path, task: Mapping[str, Any]) -> None:
        self.final = Path(folder)
        is_free = not self.final.exists() or (self.final.is_dir() and not any(self.final.iterdir()))
        require(is_free, "output", str(folder), "exists", "Choose another, or remove it.")
        self.path = self.final.with_name(f"{self.final.name}.partial")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        self._task_file = self.path.with_name(f"{self.path.name}.json")
        with contextlib.ExitStack() as unless_begun:
            unless_begun.callback(os.close, self._lock)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.path} is being written by another process.") from error
            self._begin(json.dumps(task, indent=2) + "\n")
            unless_begun.pop_all()
        self._flusher = ThreadPoolExecutor(max_workers=1)
        self._finishing: Future[None] = self._flusher.submit(lambda: None)

    def has(self, name: str) -> bool:
        """Return whether a file is finished."""
        return (self.path / name).is_file()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Yield a stream whose content becomes the file `name` after the block has ended well.

        It is flushed while the next file is written.

        Raises:
            OSError: also if the file before this one could not be flushed.
        """
        with contextlib.ExitStack() as unless_written:
            (self.path / name).parent.mkdir(exist_ok=True)
            stream = (self.path / f"{name}{_TMP}").open("wb")
            unless_written.callback(stream.close)
            yield stream
            self._finishing.result()  # none is finished after one that failed
            unless_written.pop_all()
        self._finishing = self._flusher.submit(self._finish_file, stream, name)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with self.writing(name) as stream:
            stream.write(content)

    def finish(self) -> None:
        """Give the folder its name; everything in it is on disk before that."""
        self._finishing.result()
        os.fsync(self._lock)
        self.path.rename(self.final)
        self._task_file.unlink(missing_ok=True)
        sync(self.final.parent)

    def close(self) -> None:
        """Let another process have the folder."""
        self._flusher.shutdown()
        os.close(self._lock)

    def _finish_file(self, stream: BinaryIO, name: str) -> None:
        with stream:
            stream.flush()
            os.fsync(stream.fileno())
        Path(stream.name).rename(self.path / name)
        if (self.path / name).parent != self.path:
            sync((self.path / name).parent)

    def _begin(self, task: str) -> None:
        """Remove existing files unless they belong to this task."""
        if self._task_file.is_file() and self._task_file.read_text(encoding="utf-8") == task:
            return
        for file in self.path.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        os.fsync(self._lock)  # no crash may bring them back under the name of this task
        write_whole(self._task_file, task)
