"""Partial credit step by step, on the problem with a = -3, b = 3 and on drawn ones."""

import random
from dataclasses import asdict, replace
from typing import Any

import pytest

from mcore_rl.rewards.base import REWARDS
from mcore_rl.rewards.piecewise_continuity import EXAMPLE, draw_problem

STEPS = ("break_points", "equations", "values", "answer")


def score(response, problem=EXAMPLE) -> Any:
    return REWARDS.get("piecewise_continuity")(
        data_source="piecewise_continuity",
        solution_str=response,
        ground_truth=asdict(problem),
        extra_info=None,
    )


def test_the_example_is_the_one_with_a_minus_3_and_b_3():
    assert (EXAMPLE.a, EXAMPLE.b) == (-3, 3)
    assert EXAMPLE.question == (
        "f(x) = ax + 3 if x > 2, x - 5 if -2 <= x <= 2, 2x - b if x < -2. "
        "f is continuous. Find a + b."
    )
    assert EXAMPLE.solution == ("x = 2: 2a + 3 = -3, a = -3. x = -2: -4 - b = -7, b = 3. a + b = 0")


def test_drawn_problems_are_continuous_with_their_solution_and_it_scores_1():
    rng = random.Random(0)
    for problem in [EXAMPLE, *(draw_problem(rng) for _ in range(500))]:
        a, b, left, right = problem.a, problem.b, problem.left, problem.right
        assert a * right + problem.right_offset == problem.slope * right + problem.offset
        assert problem.left_slope * left - b == problem.slope * left + problem.offset
        assert score(problem.solution, problem) == {"score": 1.0, **dict.fromkeys(STEPS, 1.0)}


def test_the_seed_fixes_the_problems():
    first, again, other = (
        [draw_problem(rng) for _ in range(20)]
        for rng in (random.Random(1), random.Random(1), random.Random(2))
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("response", "shares"),
    [
        ("", (0, 0, 0, 0)),
        ("at x = 2 and x=-2", (1, 0, 0, 0)),
        ("x = 2", (0.5, 0, 0, 0)),
        ("x = 1, x = 2, x = -1, x = -2", (0.5, 0, 0, 0)),  # guessing
        ("2a + 3 = -3", (0, 0.5, 0, 0)),
        ("-3 = 2*a+3; 2(-2) - b = -2 - 5", (0, 1, 0, 0)),
        ("2 a + 3 = 2 - 5 = -3", (0, 0.5, 0, 0)),
        ("2a + 3 = -3, so 2a = -6", (0, 0.5, 0, 0)),  # a step between is no other equation
        ("2a + 3 = -3, 3a = 1, 4a = 1", (0, 1 / 3, 0, 0)),
        ("2a = -6", (0, 0, 0, 0)),
        ("a = -3 and b = 3", (0, 0, 1, 0)),
        ("a = \u22123\nb = 4", (0, 0, 0.5, 0)),
        ("a = -3, no, a = 3. b = 3", (0, 0, 0.5, 0)),
        ("a = -3.5", (0, 0, 0, 0)),
        ("a + b = -3 + 3 = 0", (0, 0, 0, 1)),
        ("a + b = 1, the answer is 0.", (0, 0, 0, 1)),
        (r"\boxed{a + b = 0}", (0, 0, 0, 1)),
        (r"a + b = 0, so \boxed{1}", (0, 0, 0, 0)),
        ("I like a cat = 3", (0, 0, 0, 0)),
    ],
)
def test_each_step_earns_its_share(response, shares):
    found = score(response)
    assert tuple(found[step] for step in STEPS) == pytest.approx(shares)
    assert found["score"] == pytest.approx(
        sum(w * share for w, share in zip((0.2, 0.3, 0.3, 0.2), shares, strict=True))
    )


@pytest.mark.parametrize("unit", ["1", "1 ", "a ", "+1", "(1)", "= 1", " "])
def test_a_long_row_of_anything_is_judged(unit):
    assert score(unit * 20_000)["score"] == 0.0


@pytest.mark.parametrize(
    "ground_truth",
    [{"left": -2}, asdict(EXAMPLE) | {"extra": 1}, asdict(EXAMPLE) | {"right_offset": 4}],
)
def test_what_is_no_problem_is_an_error(ground_truth):
    reward = REWARDS.get("piecewise_continuity")
    with pytest.raises(ValueError):
        reward(data_source="", solution_str="", ground_truth=ground_truth, extra_info=None)


def test_a_problem_without_an_integer_a_is_refused():
    with pytest.raises(ValueError, match="integer"):
        replace(EXAMPLE, offset=-4)


def test_problems_are_drawn_from_all_slopes_and_break_points():
    rng = random.Random(0)
    problems = [draw_problem(rng, largest=1) for _ in range(400)]
    assert {problem.slope for problem in problems} == {-1, 1}
    assert {problem.left_slope for problem in problems} == {-2, -1, 1, 2}
    assert {(problem.left, problem.right) for problem in problems} == {
        (-2, 2), (-2, 3), (-3, 2), (-3, 3)
    }  # fmt: skip
    assert {problem.offset for problem in problems} == {-1, 0, 1} == {p.a for p in problems}
