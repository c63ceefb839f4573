"""The log lines of all processes of a run as one text, by time."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from pathlib import Path

from mcore_rl.errors import UserError
from mcore_rl.observability.run_folder import LOGS
from mcore_rl.printable import printable

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} ")


def merged_lines(run_dir: Path) -> Iterator[str]:
    """Yield the lines of every process, with its role and rank in each, in the order of their time.

    A line without a time belongs to the one before it, as those of a traceback do.

    Raises:
        UserError: if the folder holds no log lines.
    """
    files = sorted((run_dir / LOGS).glob("*.log"))
    if not files:
        raise UserError(f"{run_dir} holds no log lines: there is no {LOGS}/*.log in it.")
    for _, entry in heapq.merge(*map(_entries, files), key=lambda entry: entry[0]):
        yield from entry


def _entries(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (time, lines) of each entry of a file."""
    time, lines = "", []
    with open(file, encoding="utf-8", errors="replace") as opened:
        for text in opened:
            found = _TIME.match(text)
            if found and lines:
                yield time, lines
                lines = []
            time = found.group() if found else time
            lines.append(printable(text.rstrip("\n")))
    if lines:
        yield time, lines
