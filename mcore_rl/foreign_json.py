"""JSON that comes from elsewhere: whatever is wrong with it is a ValueError.

Python's own parser ends in a RecursionError where brackets stand too deep, as do those who later
copy, send or write what it returned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

MOST_LEVELS = 100
"""Deeper than any file of a model, a data set or a run; far from where Python gives up."""


def parse_json(
    text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Return what the text says.

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
    """Return how many containers lie within one another, up to one more than the most."""
    num_levels, level = 0, _containers([value])
    while level and num_levels <= MOST_LEVELS:
        num_levels += 1
        level = [y for x in level for y in _containers(x.values() if isinstance(x, dict) else x)]
    return num_levels


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]
