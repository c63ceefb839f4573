"""Probes in processes of their own: whatever happens to one, its last line is the finding."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_rl.printable import printable
from mcore_rl.processes import ending
from mcore_rl.verify.processes import Ended, run_module

ANSWER_FILE = "answer.json"
"""In the folder of a probe: an object with what it found."""
_PROBE = "mcore_rl.doctor.probe"


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a probe."""

    values: dict[str, Any] | None
    """None: it failed."""
    failure: str = ""
    """Why, in one line."""


def ask(
    name: str, *args: object, deadline_s: float, environment: Mapping[str, str] | None = None
) -> Answer:
    """Run one probe in a process of its own and return its result.

    Args:
        name: a function of `probe.py`.
        args: of it.
        deadline_s: seconds that it may take.
        environment: added to this process's.
    """
    with tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True) as name_of_it:
        folder = Path(name_of_it)
        where = {"--folder": folder, "--parent": os.getpid()}
        options = [str(word) for pair in where.items() for word in pair]
        argv = [*options, name, *map(str, args)]
        ended = run_module(_PROBE, argv, folder / "log.txt", deadline_s, environment)
        if ended.exit_code == 0:
            return Answer(json.loads((folder / ANSWER_FILE).read_text(encoding="utf-8")))
    return Answer(None, _failure(ended, deadline_s))


def ask_together(
    name: str,
    args: Sequence[Sequence[object]],
    deadline_s: float,
    environments: Sequence[Mapping[str, str]],
) -> list[Answer]:
    """Run probes that need one another, at one time; an answer for each of `args`."""
    with ThreadPoolExecutor(len(args)) as pool:
        pending = [
            pool.submit(ask, name, *own, deadline_s=deadline_s, environment=environment)
            for own, environment in zip(args, environments, strict=True)
        ]
        return [future.result() for future in pending]


def _failure(ended: Ended, deadline_s: float) -> str:
    """Return the last line of the log, which of an exception is its text, and how it ended."""
    lines = [line.strip() for line in ended.log.splitlines() if line.strip()]
    last = printable(lines[-1]) if lines else ""
    if ended.exit_code is None:
        return f"no answer within {deadline_s:g} s" + (f", last: {last}" if last else "")
    if ended.exit_code < 0:
        return f"ended by {ending(ended.exit_code)}" + (f", last: {last}" if last else "")
    return last or ending(ended.exit_code)
