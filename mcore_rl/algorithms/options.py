"""Refusal of options that another option leaves unread."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from mcore_rl.errors import require


def refuse_unread(cfg: Any, section: str, names: Iterable[str], choice: str) -> None:
    """Raise a UserError if an option that `choice` does not read was set.

    Args:
        cfg: config dataclass instance.
        section: its key: "algorithm".
        names: its fields that are not read; each must have a plain default.
        choice: what does not read them: "adv_estimator=grpo".
    """
    defaults = {field.name: field.default for field in fields(cfg)}
    for name in names:
        value = getattr(cfg, name)
        fix = f"Leave it at {defaults[name]!r}."
        rule = f"is not read with {section}.{choice}"
        require(value == defaults[name], f"{section}.{name}", value, rule, fix)
