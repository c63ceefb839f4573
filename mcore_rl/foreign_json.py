"""JSON from other sources: every error in it is a ValueError.

Python's own parser raises a RecursionError for brackets that are nested too deeply, and so does
code that later copies, sends or writes the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

MOST_LEVELS = 100
"""Deeper than in any file of a model, a data set or a run; far from Python's own limit."""


def parse_json(
    text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Return the value of the text.

    Raises:
        ValueError: if it is not UTF-8, not JSON, or nested too deeply.
    """
    content = text.decode() if isinstance(text, bytes) else text
    too_deep = f"it is nested more than {MOST_LEVELS} levels deep"
    try:
        value = json.loads(content, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError(too_deep) from None
    if content.count("[") + content.count("{") > MOST_LEVELS and _levels(value) > MOST_LEVELS:
        raise ValueError(too_deep)
    return value


def _levels(value: Any) -> int:
    """Return the depth of nested containers, at most one more than the limit."""
    num_levels, level = 0, _containers([value])
    while level and num_levels <= MOST_LEVELS:
        num_levels += 1
        level = [y for x in level for y in _containers(x.values() if isinstance(x, dict) else x)]
    return num_levels


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]
