"""Files with one JSON object per line, each with a "step", that survive a resume.

Invariants: steps never decrease within a file; every finished `append` is readable at once and
stays after the process is killed or the power is cut; opening for a resumed run drops the lines
that the resumed run will write again, so its file ends up equal to an uninterrupted one's.

Non-finite numbers are written the way Python's `json` writes and reads them: NaN, Infinity.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcore_rl.errors import RunError, UserError
from mcore_rl.foreign_json import parse_json

_STEPS = 2**53
"""More steps than any run has; a float holds each step number exactly."""


class StepFile:
    """Append-only lines for the steps from `start_step` on.

    Args:
        path: the file; made if it is missing.
        start_step: first step that this run does; lines of this step and later are dropped, and
            so is a last line that a killed process left unfinished.

    Raises:
        UserError: if a line before the last cannot be read.
        RunError: if the file cannot be written.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        with failed_write_ends_run(path, start_step):
            path.touch()
            kept_bytes = 0
            for line, record in _finished_lines(path):
                if record["step"] >= start_step:
                    break
                kept_bytes += len(line)
            os.truncate(path, kept_bytes)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line to the disk; opened and closed each time, so no buffer holds it back.

        Raises:
            RunError: if it cannot be written, on a full disk for example.
        """
        with failed_write_ends_run(self._path, record["step"]), self._path.open("ab") as file:
            file.write(json.dumps(record, default=str).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint that is on the disk has its lines there too


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, without a last line that is unfinished.

    Raises:
        UserError: if another line is not an object with a "step".
    """
    return [record for _, record in _finished_lines(path)]


def each_record(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield what `read_records` returns, a line at a time, each with the bytes of its line."""
    return ((len(line), record) for line, record in _finished_lines(path))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of which every value is a number.

    Raises:
        UserError: as `read_records`, or if a value is not a number that a float can hold.
    """
    records = read_records(path)
    for record in records:
        for key, value in record.items():
            if not _is_float(value):
                shown = repr(value) if isinstance(value, str) else f"a {type(value).__name__}"
                raise UserError(
                    f"{path}: {key} of step {record['step']} is {shown[:80]}, which is no number "
                    "that can be drawn. Remove it from the line."
                )
    return records


def _is_step(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < _STEPS


def _is_float(value: object) -> bool:
    try:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and bool([float(value)])
        )
    except OverflowError:
        return False


def _finished_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield line, _parse(path, number, line)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = parse_json(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not _is_step(record.get("step")):
        raise UserError(f"{path}: line {number} is not a JSON object with a step. Remove the line.")
    return record


@contextmanager
def failed_write_ends_run(path: Path, step: int) -> Iterator[None]:
    """Turn the OSError of a write under `path` into a RunError that says what to look at."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Check free space and quota.",
            role="controller",
            step=step,
        ) from error
