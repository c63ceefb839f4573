"""Assertions are taken apart into what the program is asked and what is expected of it."""

import json
from typing import Any

import pytest

from mcore_rl.rewards.assertions import SplitAssertions, split_assertions
from mcore_rl.rewards.sandbox import Sandbox
from tests.sandboxes import ENOUGH_S, LIMITS


def _split(*texts) -> Any:
    parts = split_assertions(texts)
    assert all(isinstance(part, SplitAssertions) for part in parts), parts
    return parts


# Text, what the program's process is asked to evaluate or do.
ASKED = {
    "assert add(1, 2) == 3": ["add(1, 2)"],
    "assert 3 == add(1, 2), 'wrong'": ["add(1, 2)"],
    "assert add(1, 2) != 4": ["add(1, 2)"],
    "assert (add(1, 2) == 3)": ["add(1, 2)"],
    "assert add(1, 2) == 3 and add(2, 2) == 4": ["add(1, 2)", "add(2, 2)"],
    "assert add(mul(2, 3), 4) == 10": ["add(mul(2, 3), 4)"],
    "assert abs(area(2) - 12.566) < 1e-3": ["area(2)"],
    "import math\nassert math.isclose(area(2), 12.566, rel_tol=1e-3)": ["area(2)"],
    "assert math.isclose(area(2), 12.566, rel_tol=1e-3)": ["area(2)"],
    "assert isclose(area(2), 12.566, rel_tol=1e-3)": ["area(2)"],
    "import numpy as np\nassert np.allclose(area(2), [12.566], rtol=1e-3)": ["area(2)"],
    "assert round(area(2), 2) == 12.57": ["area(2)"],
    "assert set(f([1, 2])) == {1, 2}": ["f([1, 2])"],
    "assert sorted(f([2, 1]), reverse=True) == [2, 1]": ["f([2, 1])"],
    "assert len(f([2, 1])) == 2": ["f([2, 1])"],
    "assert Counter(f('aab')) == Counter({'a': 2, 'b': 1})": ["f('aab')"],
    "assert f(1) is None": ["f(1)"],
    "assert f(1) is not None": ["f(1)"],
    "assert is_prime(7)": ["is_prime(7)"],
    "assert not is_prime(8)": ["is_prime(8)"],
    "assert is_prime(7) == True": ["is_prime(7)"],
    "assert 3 in f(2)": ["f(2)"],
    "assert f(2) in (1, 2)": ["f(2)"],
    "assert 0 <= f(3) <= 1": ["f(3)"],
    "assert isinstance(f(1), int)": ["f(1)"],
    "assert f(1)[0] == 2": ["f(1)"],
    "assert f(1).startswith('ab')": ["f(1)"],
    "assert Solution().add(1, 2) == 3": ["Solution().add(1, 2)"],
    "assert Stack().push(3).size == 1": ["Stack().push(3).size"],
    "assert [f(i) for i in range(3)] == [0, 1, 4]": ["[f(i) for i in range(3)]"],
    "assert {f(i) for i in range(3)} == {0, 1, 4}": ["[f(i) for i in range(3)]"],
    "assert all(f(i) for i in range(3))": ["[f(i) for i in range(3)]"],
    "assert sum(10, 15) == 25": ["sum(10, 15)"],
    "assert statistics([1, 2]) == 3": ["statistics([1, 2])"],
    "n = 3\nassert f(n) == n * n": ["n = 3", "f(n)"],
    "expected = [1, 2]\nassert f(2) == expected": ["f(2)"],
    "def near(a, b): return abs(a - b) < 1\nassert near(f(2), 3)": ["f(2)"],
    "s = Stack()\ns.push(1)\nassert s.pop() == 1\nassert len(s) == 0\nassert s.is_empty()": [
        "s = Stack()",
        "s.push(1)",
        "s.pop()",
        "len(s)",
        "s.is_empty()",
    ],
    "x = [3, 1]\nsort(x)\nassert x == [1, 3]": ["x = [3, 1]", "sort(x)", "x"],
    "r = f(3)\nassert r == 9\nassert r.bit_length() == 4": ["r = f(3)", "r", "r"],
    "random.seed(0)\nassert f(3) == 9": ["random.seed(0)", "f(3)"],
    "def check(candidate):\n    assert True, 'shown'\n    assert candidate(1) == 2\ncheck(add)": [
        "add(1)"
    ],
}


@pytest.mark.parametrize("text", ASKED)
def test_the_program_is_asked_for_what_is_its_own_and_nothing_else(text):
    [parts] = _split(text)
    assert [code for _, code in parts.steps] == ASKED[text]


CANNOT = {
    "assert f(1) == f(2)": "compared with each other",
    "assert f(1) == Point(2)": "compared with each other",
    "assert is_valid(solve(3))": "the program alone decides",
    "assert not is_valid(solve(3))": "the program alone decides",
    "assert is_valid(solve(3)) == True": "the program alone decides",
    "assert f(1).equals(3)": "decides about itself",
    "r = f(1)\nassert r.equals(3)": "decides about itself",
    "assert f(1).__eq__(3)": "it uses __eq__",
    "assert Point(1).__eq__(3)": "it uses __eq__",
    "assert isinstance(f(1), Point)": "`Point` itself is passed",
    "assert list(map(f, [1, 2])) == [1, 4]": "`f` itself is passed",
    "assert sorted(f(1), key=by) == [1, 4]": "`by` itself is passed",
    f"assert f(1) == {'1 + ' * 500} 1": "nested too deeply",
    "assert all(f(i) == i for i in range(3))": "inside of a loop",
    "for i in range(3): assert f(i) == i": "kind `for`",
    "try:\n    f(-1)\nexcept ValueError:\n    pass": "kind `try`",
    "assert (y := f(1)) == 2": "an assignment inside",
    "x = 2 * f(1)\nassert x == 4": "more than a value of the program",
    "def near(a): return abs(a - f(1)) < 1\nassert near(2)": r"near\(\) uses names of the program",
    "assert 1 == 1": "asks nothing of the program",
    "assert False": "asks nothing of the program",
    "x = 1": "asks nothing of the program",
    "from solution import add\nassert add(1, 2) == 3": "asks nothing of the program",
    "check(f(1))": "asks nothing of the program",
    "print(f(1))\nassert f(1) == 2": "only in part",
    "x = [1]\nx[0] = f(1)\nassert x == [2]": "changes a part of a variable",
    "def check(f, n=1):\n    assert f(1) == 2\ncheck(add)": "in an unusual way",
}


@pytest.mark.parametrize("text", CANNOT)
def test_what_cannot_be_told_apart_says_why(text):
    [reason] = split_assertions([text])
    assert isinstance(reason, str)
    with pytest.raises(AssertionError, match=CANNOT[text]):
        raise AssertionError(reason)


@pytest.mark.parametrize("text", ["assert f(", "\x00", "assert", "f(" * 10_000])
def test_what_is_no_python_is_an_error(text):
    with pytest.raises(ValueError, match="is no Python"):
        split_assertions(["assert f(1) == 1", text])


# What the verdict contains must not reach the program's process.
@pytest.mark.parametrize(
    "text",
    [
        "assert f(1) == 424242",
        "expected = 424242\nprint(expected)\nassert f(1) == expected",
        "expected = [424242]\nassert f([1]) == expected[0] + 0 * len('x')",
        "assert abs(f(1) - 424242) < 1e-3",
        "assert math.isclose(f(1), 424242)",
        "assert f(1).startswith('424242')",
        "r = f(1)\nassert r.startswith('424242')",
        "def near(a): return a == 424242\nassert near(f(1))",
        "def check(candidate):\n    wanted = 424242\n    assert candidate(1) == wanted\ncheck(f)",
        "assert f(1) == 1, 'not 424242'",
        "assert f(1) == (424242 if True else 0)",
    ],
)
def test_what_is_expected_is_not_among_what_the_program_is_asked(text):
    [parts] = _split(text)
    assert "424242" not in json.dumps(parts.steps)
    assert "424242" in parts.verdict or "not 424242" in text


def test_a_builtin_name_that_one_assertion_asks_for_is_the_program_s_in_all():
    first, second = _split("assert sum(10, 15) == 25", "assert sum(f(1), 2) == 3")
    assert [first.steps, second.steps] == [[("eval", "sum(10, 15)")], [("eval", "sum(f(1), 2)")]]


# Text, program, whether it holds.
HOLDS = [
    ("assert f(3) == (9, [9])", "def f(n): return n * n, [n * n]", True),
    ("assert f(3) == (9, [9])", "def f(n): return [n * n, [n * n]]", False),
    ("assert f(3) == True", "def f(n): return 1", False),
    ("assert f(3) == 1", "def f(n): return True", False),
    ("assert f(3) == 9.0", "def f(n): return n * n", True),
    ("assert f(3) == 9", "def f(n): return n * n + 1e-9", False),
    ("assert f(3) != 9", "def f(n): return n", True),
    ("assert f(3) != 9", "def f(n): return n * n", False),
    ("assert f('ab') == {'a': {1}, 'b': {2}}", "def f(s): return dict(a={1}, b={2})", True),
    ("assert f('ab') == {'a': {1}, 'b': {3}}", "def f(s): return dict(a={1}, b={2})", False),
    ("assert list(f(3)) == [0, 1, 2]", "def f(n): yield from range(n)", True),
    ("assert f(3) == [0, 1, 2]", "def f(n): yield from range(n)", False),
    ("assert f() == Decimal('1.5')", "from decimal import *\ndef f(): return Decimal(3) / 2", True),
    ("assert f() == 10**5000", "def f(): return 10**5000", True),
    ("assert f(1).startswith('ab')", "def f(n): return 'abc'", True),
    ("assert f(1).startswith('ab')", "class A: startswith = print\ndef f(n): return A()", False),
    ("import numpy as np\nassert (f() == np.arange(2)).all()", "def f(): return [0, 1]", True),
    ("import numpy as np\nassert np.allclose(f(), 1) == True", "def f(): return 1.0", True),
    ("s = S()\ns.push(1)\nassert s.pop() == 1", "class S(list): push = list.append", True),
    ("x = [3, 1]\nsort(x)\nassert x == [1, 3]", "def sort(x): x.sort()", True),
    ("x = [3, 1]\nsort(x)\nassert x == [1, 3]", "def sort(x): return sorted(x)", False),
    ("n = 2\nassert f(n) == n * n", "def f(n): return n * n", True),
    ("assert f(2) == 4\nassert f(3) == 8", "def f(n): return n * n", False),
    ("assert f(0) == 1", "def f(n): return 1 / n", False),
    ("assert f(0) in (1, 2)", "def f(n): return 2", True),
    ("assert f(0) in [1, 2]", "def f(n): return True", False),
    ("assert f(0) not in {1, 2}", "def f(n): return 3", True),
    ("assert 'b' in f(0)", "def f(n): return 'abc'", True),
    ("assert f(0) in 'abc'", "def f(n): return 'bc'", True),
]


@pytest.mark.parametrize(("text", "program", "holds"), HOLDS)
@pytest.mark.starts_processes
def test_assertions_hold_of_programs_as_python_has_it_but_by_type(text, program, holds):
    [parts] = _split(text)
    with Sandbox(program, LIMITS) as box, Sandbox("", LIMITS) as judge:
        outcome = box.evaluate(parts.steps, ENOUGH_S)
        held = not outcome.failure and judge.judge(
            parts.verdict, json.loads(outcome.output), ENOUGH_S
        )
    assert held is holds


def test_plain_comparisons_with_literals_need_no_judge():
    texts = ["assert f(1) == (2, ['a', None, True])\nassert -1.5 == g(2)", "assert f(1) == -10**2"]
    plain, computed = _split(*texts)
    assert plain.literals == [["tuple", [2, ["list", ["a", None, True]]]], -1.5]
    assert computed.literals is None
    for unordered in ("assert f(1) == {1, 2}", "assert f(1) == [{'a': 1}]"):
        assert _split(unordered)[0].literals is None
