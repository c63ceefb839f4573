r"""Whether two expressions in LaTeX are equal: by math-verify, with three of its faults fixed.

- Its parser does not read percent signs; they are read here, either as hundredths or, as its own
  comparison of integers has it, as if they were not there.
- It multiplies numbers that stand side by side: "1 1/2" was 1, "1 000" was 0, "3 4" was 12. Mixed
  numbers and thousands are rewritten; what still stands side by side is compared as text.
- It takes a difference below 1e-15 for 0, so 1/2006! was 1/2004!. Here the two must also be equal
  relative to their size: to 40 digits if both are exact, to 0.5 percent if one is a decimal, which
  math-verify rounds to six places.

Source: math-verify 0.9.0, latex2sympy2_extended 1.11.0; check this again with a new version.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

_PERCENT = re.compile(
    r"\s*+(?:\\?%|\\text\{\s*percent\s*\}|\bpercent(?:age)?\b|\bpct\b)", re.IGNORECASE
)
_THOUSANDS = re.compile(
    r"(?<![0-9.,])[1-9][0-9]{0,2}(?:(?:\\[,;:! ]|\{,\}|,\\!|[ ~\u00a0\u202f])[0-9]{3})+(?![0-9])"
)
_MIXED = re.compile(r"(?<![0-9.,^_{])([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)(?![0-9])")
_SIDE_BY_SIDE = re.compile(r"[0-9]\s+[0-9]")
_DIGITS = 50
_EXACT = "1e-40"
_ROUNDED = 5e-3


def is_equal(answer: str, reference: str) -> bool:
    """Return whether two expressions are equal; may take forever."""
    answer, reference = _rewritten(answer), _rewritten(reference)
    a, r = _PERCENT.sub("", answer), _PERCENT.sub("", reference)
    if not a.strip() or not r.strip():
        return False
    if _are_equal(a, r):
        return True
    if (a == answer) == (r == reference):
        return False
    if r == reference:
        return _are_equal(rf"\frac{{{a}}}{{100}}", r)
    return _are_equal(a, rf"\frac{{{r}}}{{100}}")


@functools.lru_cache(maxsize=4096)
def parse(latex: str) -> list:
    """Return what math-verify reads in `latex`, empty where it reads nothing."""
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_response

    # It warns at each start that its own limits are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    latex = f"${latex}$"
    return parse_response(latex, extraction_config=[LatexExtractionConfig()], parsing_timeout=0)


def _rewritten(latex: str) -> str:
    latex = _THOUSANDS.sub(lambda number: re.sub(r"[^0-9]", "", number[0]), latex.strip())
    return _MIXED.sub(r"\1\\frac{\2}{\3}", latex)


def _are_equal(answer: str, reference: str) -> bool:
    from math_verify import verify

    if _SIDE_BY_SIDE.search(answer) or _SIDE_BY_SIDE.search(reference):
        return answer.split() == reference.split()
    expected, found = parse(reference), parse(answer)
    return bool(expected and found) and (
        verify(expected, found, timeout_seconds=None) and not _are_apart(expected[0], found[0])
    )


def _are_apart(a: Any, b: Any) -> bool:
    """Return whether two expressions that math-verify calls equal differ by more than rounding."""
    import sympy

    if isinstance(a, sympy.Eq) or isinstance(b, sympy.Eq):
        a, b = (side.rhs if isinstance(side, sympy.Eq) else side for side in (a, b))
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and any(map(_are_apart, a.flat(), b.flat()))
    if isinstance(a, sympy.Tuple) and isinstance(b, sympy.Tuple):
        return any(map(_are_apart, a, b))
    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return any(all(_are_apart(x, y) for y in b) for x in a)
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        return _are_apart(a.start, b.start) or _are_apart(a.end, b.end)
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)) or (
        a.free_symbols != b.free_symbols  # "abc" may be one symbol or the product of three
    ):
        return False
    symbols = sorted(a.free_symbols, key=str)
    somewhere: Any = {s: sympy.Rational(37 + n, 23) for n, s in enumerate(symbols)}
    a, b = a.subs(somewhere), b.subs(somewhere)
    a, b = a.doit(), b.doit()
    # Not as Python's floats: the sizes may be beyond their range.
    size, other, difference = (sympy.Abs(x.evalf(_DIGITS)).evalf(15) for x in (a, b, a - b))
    is_rounded = a.has(sympy.Float) or b.has(sympy.Float)
    limit = sympy.Max(size, other) * sympy.Float(_ROUNDED if is_rounded else _EXACT)
    return (difference > limit) == True  # noqa: E712  not where sympy cannot tell
