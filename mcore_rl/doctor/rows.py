"""What a check finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """What a finding means."""

    OK = "ok"
    ABSENT = "absent"
    """It is not there, and need not be."""
    WARNING = "warning"
    """Some runs fail or are slow by it."""
    FAULT = "fault"
    """The installation is not healthy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    name: str
    """That of the check, and of which device or folder where there are several."""
    found: str
    wanted: str = ""
    status: Status = Status.OK
    fix: str = ""
    """The command that fixes it, with a comment after "#"; for something absent, the command that
    installs it."""
    must_match: str = ""
    """The value that must be equal on all nodes; "": only the status."""

    def to_json(self) -> dict[str, str]:
        """Return the fields."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Row:
        """Return the row of what `to_json` returned.

        Raises:
            ValueError: if it is something else.
        """
        if not all(isinstance(value, str) for value in fields.values()):
            raise ValueError(f"no row, for it holds what is no text: {fields}")
        try:
            return cls(**{**fields, "status": Status(fields["status"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"no row: {error}") from error


def explained_by(line: str) -> str:
    """Return the `fix` that refers to another line with the cause."""
    return f"mcore-rl doctor {line}  # what it says comes first"


def not_needed(name: str, found: str = "none") -> Row:
    """Return the row of what only CUDA devices need, where there is none."""
    return Row(name=name, found=found, wanted="not needed here", status=Status.ABSENT)


def is_healthy(rows: Sequence[Row]) -> bool:
    """Whether nothing is a fault."""
    return all(row.status is not Status.FAULT for row in rows)
