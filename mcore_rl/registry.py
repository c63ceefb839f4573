"""Registries: one decorator makes an implementation selectable by its public name.

A registry maps the name used on the command line (`geo_mean`, `gsm8k`, `vllm`) to an entry. Adding
an implementation is one new file with the decorator and one import line in the package's
`__init__`. A miss names the closest entry and lists what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from mcore_rl.errors import UserError, closest_hint

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Named entries of one kind.

    Args:
        kind: what the entries are, for error texts ("policy loss").
        key: config key that selects one ("actor.policy_loss.loss_mode").
    """

    def __init__(self, kind: str, key: str) -> None:
        self.kind, self.key = kind, key
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> Entry:
        """Register `entry` under `name` and return it.

        Raises:
            ValueError: if the name is taken by another entry.
        """
        if name in self._entries and self._entries[name] is not entry:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that registers what it decorates under `name`."""
        return lambda entry: self.add(name, entry)

    def get(self, name: str) -> Entry:
        """Return the entry called `name`.

        Raises:
            UserError: if there is none; the text names the closest one and lists all.
        """
        if name not in self._entries:
            raise UserError(
                f"{self.key}={name!r}: there is no such {self.kind}."
                f"{closest_hint(name, self._entries)} Registered: {', '.join(self.names())}."
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
