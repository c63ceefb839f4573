r"""The answer that a response states: one reading for all rewards.

Forms in which an answer is stated; the first of these kinds that occurs decides, by its last
occurrence, so listing guesses earns nothing:

1. `<answer>...</answer>`.
2. `\boxed{...}`, or GSM8K's `#### ...`, whichever comes later. A line that begins with `####` may
   as well be a header of Markdown, so it states an answer only if a number follows that numbers no
   header ("#### 2. Conclude" does), or if it is the last line.
3. "the answer is ...", "Answer: ...", or "Answer" as a line or header of its own, whichever comes
   later. The answer goes to the end of the line, or of the display mathematics that begins there;
   where nothing is left of the line, it is the next line that holds anything.

What surrounds an answer (dollar signs, brackets of mathematics, Markdown's bold, a period after it)
is no part of it. Every function here takes time in proportion to the length of the text.
"""

from __future__ import annotations

import collections
import re

_OPEN_TAG = re.compile(r"<answer>", re.IGNORECASE)
_CLOSE_TAG = re.compile(r"</answer>", re.IGNORECASE)
_BOX = re.compile(r"\\boxed\s*+\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_NUMBERED = re.compile(
    r"""
    (?<!\#) \#{4} (?!\#) (?: \\[(\[] | \\text\s*+\{ | \\boxed\s*+\{ | \\\$ | [\s$*_{(] )*+
    (?= [-+\u2212]? (?: \\?\$ | \. )?+ [0-9] | [-+\u2212]? \\[dtc]?frac )
    (?! [0-9]+ [.)] [*_]*+ [ \t]++ [^\W\d] )            # the number of a header
    """,
    re.VERBOSE,
)
_NUMBER_OF_HEADER = re.compile(r"[0-9]+[.)][*_]*+[ \t]++[^\W\d]")
_PHRASE = re.compile(r"answer[*_]*+\s*+(?:is\b(?:\s*+:)?|[:=\uff1a])", re.IGNORECASE)
_HEADING = re.compile(
    r"""
    ^ [ \t]*+ (?:\#{1,6} [ \t]*+)?+ [*_]*+
    (?: (?:the|my|our|your|final|correct|short) [ \t]++ ){0,3}
    answer [ \t]*+ [*_]*+ [ \t]*+ $
    """,
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
_BEFORE_ANSWER = re.compile(r"[\s*_:\uff1a]*+")
_DISPLAYS = {"\\[": "\\]", "$$": "$$"}
_AROUND = (*_DISPLAYS.items(), ("$", "$"), ("\\(", "\\)"))
_IN_TEXT = re.compile(
    r"\\(?:text(?:bf|it|tt|rm|sf|normal)?|math(?:rm|bf|it|sf|tt)|mbox|emph)\s*+\{([^{}]*+)\}"
)
_LATEX_SPACE = re.compile(r"\\[ ,;:!]|~")
_DEEPEST = 8
"""Most LaTeX commands, or pairs of marks, that are removed around one answer."""


def stated_answer(response: str) -> str | None:
    """Return the answer without what surrounds it, or None if none is stated."""
    if (tagged := _in_tags(response)) is not None:
        inside = stated_answer(tagged)  # no further tags, so this goes one level deep
        return _bare(tagged) if inside is None else inside
    box, hashes = _last(_BOX, response), _last_hashes(response)
    if box is not None and box.start() > hashes:
        return _bare(inside_box(response[box.end() :]))
    if hashes >= 0:
        return _bare(response[hashes:].lstrip("# \t\n").partition("\n")[0])
    marks = [mark for mark in (_last(_PHRASE, response), _last(_HEADING, response)) if mark]
    if marks:
        return _bare(_line_or_display(response[max(mark.end() for mark in marks) :]))
    return None


def answer_or_last_line(response: str) -> str:
    """Return the stated answer, or, where none is stated, the last line that holds anything."""
    stated = stated_answer(response)
    return _bare(response.strip().rpartition("\n")[2]) if stated is None else stated


def answer_in_words(response: str) -> str:
    r"""Return `answer_or_last_line` as plain words: Paris for \text{Paris}."""
    words = answer_or_last_line(response)
    for _ in range(_DEEPEST):
        inner = _IN_TEXT.sub(r"\1", words)
        if inner == words:
            break
        words = inner
    return _bare(_LATEX_SPACE.sub(" ", words)) if "\\" in words or "~" in words else words


def inside_box(rest: str) -> str:
    """Return the text up to the brace that closes the box; "" if none does."""
    depth = 1
    for brace in _BRACES.finditer(rest):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return rest[: brace.start()]
    return ""


def _last(mark: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = collections.deque(mark.finditer(text), maxlen=1)
    return found[0] if found else None


def _in_tags(response: str) -> str | None:
    """Return the text between the last opening tag that is closed and its closing tag."""
    last_close = _last(_CLOSE_TAG, response)
    if last_close is None:
        return None
    opened = _last(_OPEN_TAG, response[: last_close.start()])
    if opened is None:
        return None
    closed = _CLOSE_TAG.search(response, opened.end())
    assert closed is not None
    return response[opened.end() : closed.start()]


def _last_hashes(response: str) -> int:
    """Return where the last `####` that states an answer begins; -1 if none does."""
    numbered = _last(_NUMBERED, response)
    body = response.rstrip()
    at = body.rfind("####", body.rfind("\n") + 1)
    text = body[at:].strip("# \t*")
    is_other = _NUMBER_OF_HEADER.match(text) or _PHRASE.search(text) or _HEADING.match(text)
    if at >= 0 and not is_other:
        return at
    return -1 if numbered is None else numbered.start()


def _line_or_display(rest: str) -> str:
    start = _BEFORE_ANSWER.match(rest)
    assert start is not None
    rest = rest[start.end() :]
    close = _DISPLAYS.get(rest[:2])
    if close is not None and (end := rest.find(close, 2)) > 0:
        return rest[2:end]
    return rest.partition("\n")[0]


def _bare(text: str) -> str:
    for _ in range(_DEEPEST):
        before = text
        text = text.strip().removesuffix(".").strip()
        text = text.removeprefix("**").removesuffix("**")  # opened before "**Answer: 5**" began
        for left, right in _AROUND:
            inner = text[len(left) : -len(right)]
            is_around = text.startswith(left) and text.endswith(right) and len(text) > len(left)
            if is_around and left not in inner:  # unlike "$5$ and $6$"
                text = inner
        if text == before:
            break
    return text
