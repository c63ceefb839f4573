"""Files that are complete after a crash of the program or a power failure.

A name stands for old or new content and never for a part of it, because content is on the disk
before it gets its name. A folder must be synced for the names in it to be on the disk too.
"""

from __future__ import annotations

import os
from pathlib import Path


def make_private(folder: Path) -> None:
    """Make a folder that nobody but its owner may enter; one that is there stays as it is.

    Its content needs no modes of its own; opening the folder to others opens all of it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file so that a crash leaves either the old or the new content.

    A link of that name is replaced, and what it points to is not touched.
    """
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
    rename_whole(partial, file)


def rename_whole(partial: Path, final: Path) -> None:
    """Give a finished file or folder its name; both are in one folder."""
    sync_tree(partial)
    partial.rename(final)
    sync(final.parent)


def sync_tree(path: Path) -> None:
    """Sync a file, or a folder and everything below it."""
    for below in path.rglob("*"):
        sync(below)
    sync(path)


def sync(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
