"""The samples in the page: all of them if they fit, otherwise some of every step.

`samples.jsonl` may have hundreds of megabytes. It is read a line at a time, for the sizes; what was
chosen is read again. First choice are the last step, the first, and steps spread over the run; one
sample of every step and split comes before the second of any. A sample that no longer fits whole is
cut to the beginning and the end of its texts, without its tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from mcore_rl.foreign_json import parse_json
from mcore_rl.observability.jsonl import each_record
from mcore_rl.observability.samples import MAX_TOKENS

MOST_BYTES = 2_500_000
"""Most bytes of all samples of a page, as JSON."""
WHOLE_BYTES = 1_250_000
"""Most of these bytes for samples with all their tokens."""
WHOLE_TEXT, BRIEF_TEXT = 6_000, 300
"""Characters of a text."""


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the file."""

    start: int
    """Byte at which it begins."""
    num_whole: int
    """Most bytes of the whole sample."""
    num_brief: int
    """Bytes of the shortened sample."""
    step: int
    place: int
    """Number of earlier samples of its step and split."""


def excerpt(path: Path, share: float) -> dict[str, Any]:
    """Return the samples to show, in the order of the file, and how many it holds.

    Args:
        path: `samples.jsonl`; one that is missing holds none.
        share: of the bytes of a page.

    Raises:
        UserError: if a line is not an object with a step.
    """
    if not path.exists():
        return {"shown": [], "num": 0, "is_there": False}
    lines = _lines(path)
    longest = _choose(lines, share)
    shown = []
    with path.open("rb") as file:
        for i in sorted(longest):
            file.seek(lines[i].start)
            shown.append(_cut(parse_json(file.readline()), longest[i]))
    return {"shown": shown, "num": len(lines), "is_there": True}


def _lines(path: Path) -> list[_Line]:
    lines, start = [], 0
    num_before: Counter[tuple[int, str]] = Counter()
    for num_bytes, record in each_record(path):
        step = record["step"]
        group = step, str(record.get("split"))
        num_brief = len(json.dumps(_cut(record, BRIEF_TEXT)))
        lines.append(_Line(start, num_bytes, num_brief, step, num_before[group]))
        num_before[group] += 1
        start += num_bytes
    return lines


def _choose(lines: list[_Line], share: float) -> dict[int, int]:
    """Return which lines are shown, and how long their texts may be."""
    if sum(line.num_whole for line in lines) <= MOST_BYTES * share:
        return dict.fromkeys(range(len(lines)), WHOLE_TEXT)
    steps = sorted({line.step for line in lines})
    rank = {steps[i]: rank for rank, i in enumerate(_spread(len(steps)))}
    order = sorted(range(len(lines)), key=lambda i: (lines[i].place, rank[lines[i].step]))
    longest: dict[int, int] = {}
    num_bytes = num_whole = 0
    for i in order:
        line = lines[i]
        if num_whole + line.num_whole <= WHOLE_BYTES * share:
            longest[i] = WHOLE_TEXT
            num_whole += line.num_whole
            num_bytes += line.num_whole
        elif num_bytes + line.num_brief <= MOST_BYTES * share:
            longest[i] = BRIEF_TEXT
            num_bytes += line.num_brief
    return longest


def _spread(num: int) -> list[int]:
    """Return 0 .. num - 1: the last, the first, then halves, quarters, ... of what is between."""
    order = dict.fromkeys([num - 1, 0])
    gaps = 2
    while len(order) < num:
        order |= dict.fromkeys((num - 1) * i // gaps for i in range(1, gaps))
        gaps *= 2
    return list(order)[:num] if num else []


def _cut(record: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Return the record with its texts cut; with its tokens only where it may be long."""
    cut = {key: _cut_text(value, most) for key, value in record.items() if key != "tokens"}
    tokens = record.get("tokens") if most == WHOLE_TEXT else None
    return cut | {"tokens": tokens if _are_tokens(tokens) else None}


def _cut_text(value: Any, most: int) -> Any:
    if isinstance(value, dict | list) and len(text := json.dumps(value)) > most:
        value = text
    if not isinstance(value, str) or len(value) <= most:
        return value
    left_out = len(value) - most
    return f"{value[: most // 2]}\n[... {left_out} characters ...]\n{value[-(most - most // 2) :]}"


def _are_tokens(value: Any) -> bool:
    """Return whether it is what `SampleLog` writes: a text for each token, and numbers."""
    texts = value.get("texts") if isinstance(value, dict) else None
    if not _are(texts, str):
        return False
    numbers = [value.get("rollout_logprobs"), value.get("logprob_diffs")]
    return (
        numbers[0] is not None
        and all(x is None or (_are(x, int | float) and len(x) == len(texts)) for x in numbers)
        and _are_runs(value.get("advantages"))
    )


def _are_runs(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    values, counts = value.get("values"), value.get("counts")
    if not _are(values, int | float) or not _are(counts, int):
        return False
    return len(values) == len(counts) and all(0 < count <= MAX_TOKENS for count in counts)


def _are(values: Any, kind: Any) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
