"""What a command line assigns, verl's options translated into the keys of this package."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from mcore_rl.config.translate import TABLE, WILDCARD, Refused, Renamed, Row
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
        row = find_row(option.key)
        if row is None:
            translated.append(option)
        elif isinstance(row, Renamed):
            renamed = replace(option, key=_new_key(option.key, row), source=option.key)
            # An interpolation of the key that it is another name of says nothing.
            if str(option.value) != f"${{{renamed.key}}}":
                translated.append(renamed)
        elif isinstance(option.value, Hashable) and option.value in row.values:
            pairs = (pair.split("=") for pair in row.values[option.value].split())
            translated += [Assignment(key, text, text, option.key) for key, text in pairs]
        elif isinstance(row, Refused):
            raise UserError(f"{option.key}={option.text} has no equivalent here. {row.fix}")
        else:
            unread.setdefault(row.reason, []).append(option.key)
    reasons = [f"{', '.join(dict.fromkeys(keys))} ({reason})" for reason, keys in unread.items()]
    return translated, f"not read here: {'; '.join(reasons)}" if reasons else ""


def find_row(key: str) -> Row | None:
    """Return the row of `key`, or that of all below the nearest section."""
    parts = key.split(".")
    sections = (".".join(parts[:n]) + WILDCARD for n in range(len(parts) - 1, 0, -1))
    return next((TABLE[name] for name in (key, *sections) if name in TABLE), None)


def _new_key(key: str, row: Renamed) -> str:
    if not row.key.endswith(WILDCARD):
        return row.to
    return row.to.removesuffix("*") + key.removeprefix(row.key.removesuffix("*"))
