r"""The answer that a response states, as text.

An answer is stated in `<answer>` tags, in `\boxed{}`, or after "the answer is" or "Answer:" up to
the end of its line; the first of these three kinds that occurs decides, by its last occurrence, so
listing guesses earns nothing. The dollar signs around it and the period after it are no part of it.
"""

from __future__ import annotations

import re

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*\{")
_WORDS = re.compile(r"answer\s*(?:is\b\s*:?|:)", re.IGNORECASE)


def stated_answer(response: str) -> str | None:
    """Return the answer without what surrounds it, or None if none is stated."""
    if tagged := _TAGS.findall(response):
        return _bare(tagged[-1])
    if boxes := list(_BOX.finditer(response)):
        return _bare(inside_box(response[boxes[-1].end() :]))
    if words := list(_WORDS.finditer(response)):
        return _bare(response[words[-1].end() :].lstrip().partition("\n")[0])
    return None


def answer_or_last_line(response: str) -> str:
    """Return the stated answer, or, where none is stated, the last line that holds anything."""
    stated = stated_answer(response)
    return _bare(response.strip().rpartition("\n")[2]) if stated is None else stated


def inside_box(rest: str) -> str:
    """Return the text up to the brace that closes the box; "" if none does."""
    depth = 1
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:position]
    return ""


def _bare(text: str) -> str:
    text = text.strip().removesuffix(".").rstrip()
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text.strip("*").strip()  # Markdown's bold
