"""The page of verl's options, from the table by which they are translated."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

from mcore_rl.config.translate import SECTIONS, Refused, Renamed, Row, Unread

Kind = TypeVar("Kind")

HEAD = """# Options of verl

Every option of verl that has another name here, or none. This page is generated from
`mcore_rl/config/translate.py`. Keys stand without the prefix `actor_rollout_ref.`; a key that ends
in `.*` stands for all below it that have no row of their own. An option that is in no row has its
own name here: [configuration](configuration.md). [Coming from verl](coming-from-verl.md) says what
to do with a command line.
"""


def page() -> str:
    """Return the page."""
    return HEAD + "".join(
        f"\n## {section}\n\n"
        + _table("goes to", (f"| `{row.key}` | `{row.to}` |" for row in _of(Renamed, rows)))
        + _table(
            "is named in one warning, since no number depends on it",
            (f"| `{row.key}` | {_why(row.reason, row.values)} |" for row in _of(Unread, rows)),
        )
        + _table(
            "is refused, since numbers or the model depend on it",
            (f"| `{row.key}` | {_why(row.fix, row.values)} |" for row in _of(Refused, rows)),
        )
        for section, rows in SECTIONS.items()
    )


def _of(kind: type[Kind], rows: tuple[Row, ...]) -> list[Kind]:
    return [row for row in rows if isinstance(row, kind)]


def _table(head: str, rows: Iterable[str]) -> str:
    lines = "\n".join(rows)
    return f"| option | {head} |\n|---|---|\n{lines}\n\n" if lines else ""


def _why(reason: str, values: Mapping[Hashable, str]) -> str:
    """Return the reason, and the values that are accepted in silence."""
    accepted = [_value(value, meaning) for value, meaning in values.items()]
    more = f" Accepted: {', '.join(accepted)}." if accepted else ""
    return f"{reason[0].upper()}{reason[1:].rstrip('.')}.{more}".replace("|", "\\|")


def _value(value: Hashable, meaning: str) -> str:
    shown = {None: "null", True: "true", False: "false"}.get(value, value)  # type: ignore[arg-type]
    return f"`{shown}`" + (f" (`{meaning}`)" if meaning else "")
