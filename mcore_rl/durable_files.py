"""Files that are there, whole, after a crash of the program or of the machine's power.

A name stands for old or new content and never for a part of it, because content is on the disk
before it gets its name. A folder must be synced for the names in it to be on the disk too.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write a file so that a crash leaves either the old or the new content."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
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
