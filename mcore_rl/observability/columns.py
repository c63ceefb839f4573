"""The columns of `metrics.jsonl`: what a metric was at the steps that logged it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Series(NamedTuple):
    """One metric over the steps that logged it."""

    steps: list[int]
    values: list[float]


Columns = Mapping[str, Series]


def to_columns(records: Iterable[Mapping[str, Any]]) -> Columns:
    """Turn records {"step": 0, "reward/mean": 0.5} into a series per metric."""
    columns: dict[str, Series] = {}
    for record in records:
        for key, value in record.items():
            if key != "step":
                series = columns.setdefault(key, Series([], []))
                series.steps.append(record["step"])
                series.values.append(value)
    return columns


def matching(columns: Columns, patterns: Sequence[str]) -> list[str]:
    """Return the keys that match a pattern, in the order of the patterns, then by name."""
    return [key for pattern in patterns for key in sorted(columns) if fnmatchcase(key, pattern)]
