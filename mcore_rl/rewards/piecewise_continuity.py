"""A toy problem with partial credit: find a and b so that a piecewise function is continuous.

    f(x) = ax + 3 if x > 2;  x - 5 if -2 <= x <= 2;  2x - b if x < -2

The outer pieces meet the middle one at the break points: x = 2 gives 2a + 3 = -3 and so a = -3,
x = -2 gives -4 - b = -7 and so b = 3, and a + b = 0. A response earns credit for each of these
steps (`CREDIT`). Guessing costs: of break points and equations the right ones count against all
that are stated, of values and sums the last counts. Steps between, such as 2a = -6, change nothing.

Problems are integers throughout. Expressions are read where they are linear in a, b or x:
"2a + 3", "2*a+3", "2(-2) - b".
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mcore_rl.rewards.answer_text import stated_answer
from mcore_rl.rewards.base import REWARDS, Score
from mcore_rl.rewards.ground_truth import reads
from mcore_rl.rewards.number_text import stated_number

CREDIT = {"break_points": 0.2, "equations": 0.3, "values": 0.3, "answer": 0.2}
"""Credit of each step; a complete solution scores 1."""

Linear = dict[str, int]
"""An expression as {"a": 2, "": 3} for 2a + 3; no zeros."""

Equalities = list[tuple[Linear, Linear]]
"""What a response says to be equal, left and right side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """f(x) = ax + right_offset if x > right, left_slope x - b if x < left, else slope x + offset.

    The fields, as a mapping, are the `ground_truth` of a row.
    """

    left: int
    right: int
    slope: int
    offset: int
    right_offset: int
    left_slope: int

    def __post_init__(self) -> None:
        if not self.left < self.right or self.right == 0:
            raise ValueError(f"{self}: needs left < right and right != 0")
        if (self.middle(self.right) - self.right_offset) % self.right:
            raise ValueError(f"{self}: a is no integer")

    def middle(self, x: int) -> int:
        """Return the value of the middle piece."""
        return self.slope * x + self.offset

    @property
    def a(self) -> int:
        return (self.middle(self.right) - self.right_offset) // self.right

    @property
    def b(self) -> int:
        return self.left_slope * self.left - self.middle(self.left)

    @property
    def question(self) -> str:
        """The problem in words."""
        pieces = (
            f"{_text({'a': 1, '': self.right_offset}, 'ax')} if x > {self.right}",
            f"{_text({'x': self.slope, '': self.offset})} if {self.left} <= x <= {self.right}",
            f"{_text({'x': self.left_slope, 'b': -1})} if x < {self.left}",
        )
        return f"f(x) = {', '.join(pieces)}. f is continuous. Find a + b."

    @property
    def solution(self) -> str:
        """A response that scores 1."""
        at_right, at_left = self.outer_pieces()
        return (
            f"x = {self.right}: {_text(at_right)} = {self.middle(self.right)}, a = {self.a}. "
            f"x = {self.left}: {_text(at_left)} = {self.middle(self.left)}, b = {self.b}. "
            f"a + b = {self.a + self.b}"
        )

    def outer_pieces(self) -> tuple[Linear, Linear]:
        """Return the values of the outer pieces at their break points, that with a first."""
        at_right = _linear({"a": self.right, "": self.right_offset})
        return at_right, _linear({"": self.left_slope * self.left, "b": -1})


EXAMPLE = Problem(left=-2, right=2, slope=1, offset=-5, right_offset=3, left_slope=2)
"""a = -3, b = 3, a + b = 0."""


def draw_problem(rng: random.Random, largest: int = 5) -> Problem:
    """Return a problem whose a and middle offset are at most `largest`: one of 32 (2 n + 1)^2."""
    right, slope, offset = rng.choice((2, 3)), rng.choice((-1, 1)), rng.randint(-largest, largest)
    a = rng.randint(-largest, largest)
    return Problem(
        left=-rng.choice((2, 3)),
        right=right,
        slope=slope,
        offset=offset,
        right_offset=slope * right + offset - a * right,
        left_slope=rng.choice((-2, -1, 1, 2)),
    )


def read_problem(ground_truth: Any) -> Problem:
    """Return the problem of a row.

    Raises:
        ValueError: if `ground_truth` is not the fields of a `Problem` with integer solutions.
    """
    try:
        return Problem(**ground_truth)
    except TypeError as error:
        raise ValueError(f"ground_truth {ground_truth!r} is no problem: {error}") from None


@REWARDS.register("piecewise_continuity")
@reads(read_problem)
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> Score:
    """Return the score in [0, 1], and the share of each step of `CREDIT` that is right.

    Raises:
        ValueError: if `ground_truth` is not the fields of a `Problem` with integer solutions.
    """
    problem = read_problem(ground_truth)
    equalities = list(_equalities(solution_str))
    shares = {
        "break_points": _break_points(equalities, problem),
        "equations": _equations(equalities, problem),
        "values": _values(equalities, problem),
        "answer": float(_answer(equalities, solution_str) == problem.a + problem.b),
    }
    return {"score": sum(CREDIT[step] * share for step, share in shares.items()), **shares}


def _break_points(equalities: Equalities, problem: Problem) -> float:
    stated = set(_numbers(equalities, {"x": 1}))
    return len(stated & {problem.left, problem.right}) / max(2, len(stated))


def _equations(equalities: Equalities, problem: Problem) -> float:
    at_right, at_left = problem.outer_pieces()
    expected = {
        "a": (at_right, _linear({"": problem.middle(problem.right)})),
        "b": (at_left, _linear({"": problem.middle(problem.left)})),
    }
    value_of = {"a": problem.a, "b": problem.b}
    found, num_wrong = set(), 0
    for left, right in equalities:
        for unknown, equation in expected.items():
            if (left, right) in (equation, equation[::-1]):
                found.add(unknown)
            elif {*left, *right} - {""} == {unknown} and left != {unknown: 1}:
                difference = left.get(unknown, 0) - right.get(unknown, 0)
                rest = right.get("", 0) - left.get("", 0)
                num_wrong += difference * value_of[unknown] != rest
    return len(found) / max(2, len(found) + num_wrong)


def _values(equalities: Equalities, problem: Problem) -> float:
    last = {"a": _last(equalities, {"a": 1}), "b": _last(equalities, {"b": 1})}
    return ((last["a"] == problem.a) + (last["b"] == problem.b)) / 2


def _answer(equalities: Equalities, response: str) -> int | None:
    stated = stated_answer(response)
    if stated is None:
        return _last(equalities, {"a": 1, "b": 1})
    number = stated_number(stated.rpartition("=")[2])
    return int(number) if number is not None and number.denominator == 1 else None


def _last(equalities: Equalities, expression: Linear) -> int | None:
    numbers = _numbers(equalities, expression)
    return numbers[-1] if numbers else None


def _numbers(equalities: Equalities, expression: Linear) -> list[int]:
    """Return the numbers that the expression is said to equal."""
    return [
        right.get("", 0) for left, right in equalities if left == expression and not {*right} - {""}
    ]


# Quantifiers are possessive: a long row of digits would take forever otherwise.
_FACTOR = r"(?:[0-9]++(?!\.[0-9])|[abx](?!\w)|\( *-? *[0-9]++ *\))"
_PRODUCT = rf"{_FACTOR}(?: *+(?:\* *+)?+{_FACTOR})*+"
_SIDE = rf"([-+]?+ *+{_PRODUCT}(?: *+[-+] *+{_PRODUCT})*+)"
_LEFT_SIDE = re.compile(rf"(?<![\w.]){_SIDE} *+\Z")
_RIGHT_SIDE = re.compile(rf" *+{_SIDE}")
_TERM = re.compile(rf"([-+]?) *+({_PRODUCT})")
_ATOM = re.compile(r"-? *[0-9]+|[abx]")
_MOST_EQUALITIES = 10_000
"""The last ones of a response count; no solution has as many."""
_LONGEST_SIDE = 80
"""Characters before an equals sign in which the left side begins, and after it in which the right
side ends; what is longer is not read, so that numbers stay small."""


def _equalities(text: str) -> Iterator[tuple[Linear, Linear]]:
    """Yield both sides of every equals sign between linear expressions."""
    parts = text.replace("\u2212", "-").split("=")[-_MOST_EQUALITIES - 1 :]
    for before, after in itertools.pairwise(parts):
        found = _LEFT_SIDE.search(before[-_LONGEST_SIDE:]), _right_side(after)
        left, right = (_parse(match[1]) if match else None for match in found)
        if left is not None and right is not None:
            yield left, right


def _right_side(after: str) -> re.Match[str] | None:
    found = _RIGHT_SIDE.match(after[: _LONGEST_SIDE + 1])
    return None if found is not None and found.end() > _LONGEST_SIDE else found


def _parse(side: str) -> Linear | None:
    """Return the sum of the products in `side`; None if one has two unknowns."""
    total: Linear = {}
    for sign, product in _TERM.findall(side):
        atoms = _ATOM.findall(product)
        unknowns = [atom for atom in atoms if atom.isalpha()]
        if len(unknowns) > 1:
            return None
        coefficient = -1 if sign == "-" else 1
        for atom in atoms:
            if not atom.isalpha():
                coefficient *= int(atom.replace(" ", ""))
        unknown = unknowns[0] if unknowns else ""
        total[unknown] = total.get(unknown, 0) + coefficient
    return _linear(total)


def _linear(coefficients: Linear) -> Linear:
    return {unknown: n for unknown, n in coefficients.items() if n}


def _text(expression: Linear, a_term: str = "a") -> str:
    """Return the expression as people write it: {"x": -1, "": 2} as "-x + 2"."""
    terms = []
    for unknown, n in expression.items():
        if n:
            size = "" if abs(n) == 1 and unknown else str(abs(n))
            name = a_term if unknown == "a" else unknown
            terms.append(("-" if n < 0 else "+", size + name))
    (sign, first), *rest = terms or [("+", "0")]
    return sign.strip("+") + first + "".join(f" {sign} {term}" for sign, term in rest)
