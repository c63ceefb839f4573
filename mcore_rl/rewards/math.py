r"""Reward for mathematics: the stated answer equals the reference as an expression.

The answer is read as `answer_text` says. Texts that are equal but for white space and LaTeX's sizes
are equal, plain numbers are compared at once (`plain_value`), and everything else is left to the
library math-verify (github.com/huggingface/Math-Verify, `math_equal.py`), which takes 10 to 120 ms:
`\frac{1}{2}` is 0.5, sets have no order, units do not count. Outcomes are remembered, since the
samples of a prompt often agree.

A response can hold what no parser or simplifier ends on (`9^{9^{9^9}}`), so the comparison is
forked off and has a few seconds of CPU time and a limit on its memory; beyond them the answer is
wrong, as is one of more than `_LONGEST_ANSWER` characters. The library's own limits are off:
signals do not interrupt what sympy computes in C.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mcore_rl.rewards.answer_text import stated_answer
from mcore_rl.rewards.base import REWARDS, AnswerScore
from mcore_rl.rewards.forked import call_forked
from mcore_rl.rewards.ground_truth import any_of, reads, text_of
from mcore_rl.rewards.number_text import number_answer, plain_number

_CPU_S = 5
_LIMIT_S = 20.0
_MEMORY_BYTES = 2 * 2**30
_LONGEST_ANSWER = 2_000
_SIZES = re.compile(
    r"\\(?:left|right|big|Big|displaystyle)(?![A-Za-z])|\\[!,;:]|\$|(?<![0-9])\s+|\s+(?![0-9])"
)
_SAME_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")
_PERCENT = re.compile(
    r"\s*+(?:\\?%|\\text\{\s*percent\s*\}|percent(?:age)?|pct)\s*+\Z", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class PlainValue:
    """A number that needs no parser."""

    number: Fraction
    is_decimal: bool
    is_percent: bool


def read_answers(ground_truth: Any) -> list[str]:
    """Return the acceptable answers of a row.

    Raises:
        ValueError: if there is none, or one is no text or number.
    """
    return any_of(ground_truth, text_of)


@REWARDS.register("math")
@reads(read_answers)
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> AnswerScore:
    """Return 1.0 if the stated answer of `solution_str` equals `ground_truth`, otherwise 0.0, and
    that answer: a plain number as such, so that 0.5 and 1/2 are one, all else as it is written.

    Raises:
        ValueError: if `ground_truth` is neither a text that holds anything nor a number, or a list
            of them.
    """
    references, answer = read_answers(ground_truth), stated_answer(solution_str)
    if not answer:
        return {"score": 0.0, "pred": None}
    score = float(any(_is_right(answer, reference) for reference in references))
    plain = plain_number(answer)
    return {"score": score, "pred": number_answer(plain) or _canonical(answer)}


def _is_right(answer: str, reference: str) -> bool:
    if _canonical(answer) == _canonical(reference):
        return True
    a, b = plain_value(answer), plain_value(reference)
    if a is not None and b is not None:
        return _is_same_number(a, b)
    return len(answer) <= _LONGEST_ANSWER and _is_equal(answer, reference)


@functools.lru_cache(maxsize=16_384)
def _is_equal(answer: str, reference: str) -> bool:
    from mcore_rl.rewards import math_equal  # sympy: a second, so only when needed

    math_equal.parse(reference)  # kept for every sample of the prompt, and it warms the parser up
    equal = call_forked(
        math_equal.is_equal,
        answer,
        reference,
        cpu_s=_CPU_S,
        limit_s=_LIMIT_S,
        memory_bytes=_MEMORY_BYTES,
    )
    return bool(equal)


def plain_value(text: str) -> PlainValue | None:
    """Return the number that `text` is, without a unit but for a percent sign; None if it is more
    than that."""
    text = text.strip().strip("$").strip()
    number = _PERCENT.sub("", text)
    value = plain_number(number)
    if value is None:
        return None
    return PlainValue(value, "." in number or "e" in number.lower(), number != text)


def _is_same_number(a: PlainValue, b: PlainValue) -> bool:
    """Compare as math-verify does: two decimals, or a decimal and a fraction, to six places;
    percent are hundredths or, where only the sign differs, the number itself."""
    if _is_near(a, b):
        return True
    if a.is_percent == b.is_percent:
        return False
    percent, other = (a, b) if a.is_percent else (b, a)
    return _is_near(PlainValue(percent.number / 100, percent.is_decimal, False), other)


def _is_near(a: PlainValue, b: PlainValue) -> bool:
    difference, size = abs(a.number - b.number), max(abs(a.number), abs(b.number))
    has_integer = any(x.number.denominator == 1 and not x.is_decimal for x in (a, b))
    if has_integer or not (a.is_decimal or b.is_decimal):
        return difference == 0
    # Six places of a small number may be all zeros.
    return round(a.number, 6) == round(b.number, 6) and difference <= size / 200


def _canonical(text: str) -> str:
    return _SAME_FRACTION.sub(r"\\frac", _SIZES.sub("", text.strip())).removesuffix(".")
