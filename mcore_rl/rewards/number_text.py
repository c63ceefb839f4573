r"""Numbers as people write them: "1,234", "-3", "$18.50", "2/3", "1 1/2", "2e5", "2 million".

A number is the whole of such an expression, never a part of it: "2/3" does not hold 2. Numbers are
exact fractions, so 3.0 equals 3 and no rounding happens. A minus is a sign only where nothing
precedes it that could be subtracted from ("10-3" holds 10 and 3). Digits glued to a letter before
them ("x2") are no number of their own. Sums, products and ranges are not worked out; a number of
more than `_MOST_DIGITS` digits equals none. Time is in proportion to the length of the text.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from mcore_rl.rewards.ground_truth import any_of, text_of

_MOST_DIGITS = 400
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SPACE = r"(?:\s|~|\\[ ,;:!])"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]++)"
_NUMBER = re.compile(
    rf"""
    (?P<sign> (?<![\w)\]}}.]) [-\u2212] )?                  # ASCII hyphen or Unicode minus
    (?: \\?\$ )?                                           # dollar sign, in LaTeX escaped
    (?<! [A-Za-z_0-9.] )                                   # not inside a word or a version number
    (?: (?P<whole> [0-9]++ ) (?: {_SPACE}*+ (?=\\) | {_SPACE}{{1,3}} )
        (?= \\[dtc]?frac | [0-9]+ / ) )?
    (?: \\[dtc]?frac \s*+
        (?: \{{ \s*+ (?P<above> -? {_DIGITS} ) \s*+ \}}
            \s*+ \{{ \s*+ (?P<below> {_DIGITS} ) \s*+ \}}
          | \s*+ (?P<digit_above> [0-9] ) \s*+ (?P<digit_below> [0-9] ) (?![0-9]) )
      | (?P<digits> {_DIGITS} (?: \.[0-9]++ )? | \.[0-9]++ )
        (?: \s?/\s?\$? (?P<over> {_DIGITS} ) (?! \.[0-9] | \s?/\s?[0-9] )
          | [eE] (?P<e> [-+]? [0-9]++ ) (?! \w )
          | {_SPACE}*+ (?: \\times | \\cdot | [x*\u00d7\u00b7] ) {_SPACE}*+ 10 \s?
            (?: \^ | \*\* ) \s? (?P<ten> \{{ [-+\u2212]? [0-9]++ \}} | [-+\u2212]? [0-9]++ )
          | \s? (?: \^ | \*\* ) \s? (?P<power> \{{ [-\u2212]? [0-9]++ \}} | [-\u2212]? [0-9]++ ) )?+
    )
    (?: {_SPACE}*+ (?: \\text\s*+\{{ \s*+ )? (?P<scale> {"|".join(_SCALES)} ) s? \b \}}? )?+
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LATEX_COMMA = re.compile(r"\{,\}|,\\!|(?<=[0-9])\\[,!](?=[0-9]{3}(?![0-9]))")
_SPACED_THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:[ \u00a0\u202f][0-9]{3})+(?![0-9])")
_FIRST_SIGNS = r"(?: \\?\$ )?+ [-+\u2212]?+ (?: \\?\$ )?+ (?: \.?[0-9] | \\[dtc]?frac )"
_BETWEEN = r"(?: [\s$*_)}\]%~] | \\[\ ,;:!%$)\]] )*+"
_OPERATOR = r"""(?: \*\* | [-+*/^=<>,;&\u2212\u00d7\u00f7\u00b7\u00b1\u2013] | : (?=[0-9])
    | x (?= \s?[0-9] ) | \\(?:times|cdot|div|pm)\b
    | \\text\s*+\{ \s*+ (?:or|and|to) \s*+ \} | (?:or|and)\b
    | to\b (?! \s*+ [0-9]++ \s*+ (?:decimal|significant|place) ) )"""
_GOES_ON = re.compile(
    rf"""
      {_BETWEEN} (?: = | {_OPERATOR}++ {_BETWEEN} \(? {_FIRST_SIGNS} | {_FIRST_SIGNS} )
    | {_BETWEEN} (?!m\b) [a-z] {_BETWEEN} \^               # of a variable; cm^2 is a unit
    | {_BETWEEN} (?: \\text\s*+\{{ )? \s*+ [a-z]++ {_BETWEEN} (?! \^ )
      (?: = | {_OPERATOR}++ {_BETWEEN} {_FIRST_SIGNS} )
    | [^\n.]{{0,80}}? \bor\b [^\n.0-9]{{0,40}} [0-9]
    | \s?+ (?: \^ | \*\* ) (?! \s*+ \{{? \s*+ \\(?:circ|degree|prime) | [\s*] | \Z )
    | {_BETWEEN} \\(?: (?! text|math|mbox|quad|left|right|degree|circ|times|cdot ) [a-z] )
    """,
    re.VERBOSE | re.IGNORECASE,
)
r"""After a number: an equation, another number, or what makes it a part of an expression (5\pi)."""
_COMMAND = re.compile(r"\\(?!text|math|mbox|boxed|left|big|approx|quad|display)[A-Za-z]")
r"""Before a number: what makes it an argument (\sqrt{16})."""
_LONGEST_ANSWER = 2_000
"""Most characters of a stated answer that are read."""


def find_numbers(text: str) -> list[Fraction | None]:
    """Return every number in `text`, in order; None for one that is too long."""
    return [_value(match) for match in _matches(text)]


def last_number(text: str) -> Fraction | None:
    """Return the last number in `text`; None if there is none, or if it is an unfinished
    calculation ("10/2", "2^10")."""
    found = collections.deque(_matches(text), maxlen=1)
    if not found or found[0]["power"]:
        return None
    value = _value(found[0])
    return None if found[0]["over"] and value is not None and value.denominator == 1 else value


def plain_number(text: str) -> Fraction | None:
    """Return the number that `text` is; None if it is anything more."""
    if len(text) > _LONGEST_ANSWER:
        return None
    found = _NUMBER.fullmatch(_cleaned(text))
    return None if found is None else _value(found)


def stated_number(answer: str) -> Fraction | None:
    """Return the number that a stated answer consists of, with or without words and a unit.

    Of an equation it is the last side. None if there is no number, or several ("2 or 3"), or more
    than a number ("5 + 3", "5\\pi").
    """
    answer = _cleaned(answer[:_LONGEST_ANSWER])
    found = _NUMBER.search(answer)
    if found is not None and _GOES_ON.match(answer, found.end()):
        _, equals, answer = answer[found.end() :].rpartition("=")
        found = _NUMBER.search(answer) if equals else None
        if found is not None and _GOES_ON.match(answer, found.end()):
            return None
    if found is None or _COMMAND.search(answer[: found.start()].rpartition("=")[2]):
        return None
    return _value(found)


def parse_number(value: Any) -> Fraction:
    """Return the one number that a reference answer ("1,080", 72, 3.0, "2/3") consists of.

    Raises:
        ValueError: if it holds no number or several.
    """
    text = text_of(value)
    found, number = len(list(_matches(text))), stated_number(text)
    if found != 1 or number is None:
        raise ValueError(f"ground_truth {value!r} is not one number")
    return number


def number_answer(number: Fraction | None) -> str | None:
    """Return a number as an answer: "72", "2/3"."""
    return None if number is None else str(number)


def read_numbers(ground_truth: Any) -> list[Fraction]:
    """Return the acceptable numbers of a row.

    Raises:
        ValueError: if one is not one number, or there is none.
    """
    return any_of(ground_truth, parse_number)


def _matches(text: str) -> Iterator[re.Match[str]]:
    return _NUMBER.finditer(_LATEX_COMMA.sub(",", text))


def _cleaned(answer: str) -> str:
    """Return the answer with its thousands apart by commas only."""
    spaced = _SPACED_THOUSANDS.sub(lambda number: "".join(number[0].split()), answer)
    return _LATEX_COMMA.sub(",", spaced)


def _value(match: re.Match[str]) -> Fraction | None:
    """Return the number that was found; None if it is too long, or divided by 0."""
    part = match.groupdict()
    exponent = int(_plain(part["e"] or part["ten"])[: len(str(_MOST_DIGITS)) + 2] or 0)
    power = int(_plain(part["power"])[: len(str(_MOST_DIGITS)) + 2] or 1)
    length = sum(len(_plain(part[name])) for name in ("whole", "above", "below", "digits", "over"))
    below = (
        int(_plain(part["below"] or part["digit_below"] or part["over"]) or 1)
        if (length <= _MOST_DIGITS)
        else 0
    )
    if below == 0 or length * abs(power) + abs(exponent) > _MOST_DIGITS:
        return None
    above = Fraction(_plain(part["digits"] or part["above"] or part["digit_above"]))
    if above == 0 and power < 0:
        return None
    value = above**power * Fraction(10) ** exponent / below + int(_plain(part["whole"]) or 0)
    scale = 10 ** _SCALES[part["scale"].lower()] if part["scale"] else 1
    return (-value if part["sign"] else value) * scale


def _plain(digits: str | None) -> str:
    return (digits or "").replace(",", "").replace("\u2212", "-").strip("{}")
