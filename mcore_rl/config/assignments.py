"""What a command line assigns, verl's options translated into the keys of this package."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from mcore_rl.config.translate import TABLE, WILDCARD, Refused, Renamed, Row, Unread
from mcore_rl.errors import UserError


@dataclass(frozen=True, slots=True)
class Assignment:
    """One `key=value` of the command line."""

    key: str
    """Without signs and prefix: "rollout.n"."""
    value: Any
    """5"""
    text: str
    """The value as it was written: "5"."""
    source: str = ""
    """The option that asked for it under another name; "" if it is `key` itself."""


def translate(given: Iterable[Assignment]) -> tuple[list[Assignment], str]:
    """Return the assignments in the names of this package, and the warning, "" if there is none.

    Raises:
        UserError: for an option that is refused.
    """
    translated: list[Assignment] = []
    unread: dict[str, list[str]] = {}
    for option in given:
        pattern, row = find_row(option.key)
        targets = [option]
        if isinstance(row, Renamed):
            key = _renamed(option.key, pattern, row.key)
            # An interpolation of the key that it is another name of says nothing.
            refers_to_itself = str(option.value) == f"${{{key}}}"
            targets = [] if refers_to_itself else [replace(option, key=key, source=option.key)]
        elif row is not None and _is_known(option.value, row):
            pairs = (pair.split("=") for pair in row.values[option.value].split())
            targets = [Assignment(key, text, text, option.key) for key, text in pairs]
        elif isinstance(row, Unread):
            unread.setdefault(row.reason, []).append(option.key)
            targets = []
        elif isinstance(row, Refused):
            raise UserError(f"{option.key}={option.text} has no equivalent here. {row.fix}")
        translated += targets
    reasons = [f"{', '.join(dict.fromkeys(keys))} ({reason})" for reason, keys in unread.items()]
    return translated, f"not read here: {'; '.join(reasons)}" if reasons else ""


def find_row(key: str) -> tuple[str, Row | None]:
    """Return the row of `key`, or of all below the nearest section, with the key of the row."""
    parts = key.split(".")
    sections = (".".join(parts[:n]) + WILDCARD for n in range(len(parts) - 1, 0, -1))
    pattern = next((name for name in (key, *sections) if name in TABLE), key)
    return pattern, TABLE.get(pattern)


def _is_known(value: Any, row: Unread | Refused) -> bool:
    return isinstance(value, Hashable) and value in row.values


def _renamed(key: str, pattern: str, new: str) -> str:
    below = key.removeprefix(pattern.removesuffix("*")) if pattern.endswith(WILDCARD) else ""
    return new.removesuffix("*") + below
