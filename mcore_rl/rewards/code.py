"""Reward for programs: the Python code of the response passes every test, in a sandbox.

The program is the last ```python block of the response, otherwise its last ``` block; without
either the score is 0. `ground_truth` is a mapping, or its JSON, in one of the forms of verl's data:

    {"inputs": ["1 2\\n", ...], "outputs": ["3\\n", ...]}                programs: stdin to stdout
    {"fn_name": "add", "inputs": [[1, 2], ...], "outputs": [3, ...]}   a function, or of `Solution`
    {"assert_case": ["assert add(1, 2) == 3", ...]}                    code that raises where wrong

Outputs are equal if their lines are, without white space at the ends of lines and of the whole.
Results of a function are compared as JSON, so tuples are lists; an expected result may stand alone
in a list, as in APPS (arXiv:2105.09938). Inputs of a function may be text with one JSON value per
line. Tests run until one fails. A test that shares a process with the program (`assert_case`) can
be deceived by it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mcore_rl.rewards.base import REWARDS, SandboxConfig
from mcore_rl.rewards.sandbox import Sandbox

Test = Callable[[Sandbox, float], bool]
"""Runs in a sandbox, within a number of seconds; whether the program passed."""

_PYTHON = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
_ANY = re.compile(r"```[\w+-]*[ \t]*\n(.*?)```", re.DOTALL)


@REWARDS.register("code_generation")
@REWARDS.register("code")
def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping | None = None,
    *,
    sandbox: SandboxConfig,
) -> float:
    """Return 1.0 if the program of `solution_str` passes every test, otherwise 0.0.

    Raises:
        ValueError: if `ground_truth` has none of the forms, or no tests.
        UserError: if the sandbox lacks protections.
    """
    tests = read_tests(ground_truth)
    program = extract_program(solution_str)
    if program is None:
        return 0.0
    until = time.monotonic() + sandbox.timeout_s
    with Sandbox(program, sandbox) as box:
        for test in tests:
            left = min(sandbox.test_timeout_s, until - time.monotonic())
            if left <= 0 or not test(box, left):
                return 0.0
    return 1.0


def extract_program(response: str) -> str | None:
    """Return the code of the last Python block, or the last block, or None."""
    blocks = _PYTHON.findall(response) or _ANY.findall(response)
    return blocks[-1] if blocks else None


def read_tests(ground_truth: Any) -> list[Test]:
    """Return the tests of a row.

    Raises:
        ValueError: if it has none of the forms above, or no tests.
    """
    case = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if not isinstance(case, Mapping):
        raise ValueError(f"ground_truth {str(ground_truth)[:80]!r} is no mapping of tests")
    tests = list(_tests(case))
    if not tests:
        raise ValueError(f"ground_truth has no tests; its keys are {sorted(case)}")
    return tests


def _tests(case: Mapping[str, Any]) -> Iterator[Test]:
    if case.get("assert_case"):
        yield from map(_assertion_test, case["assert_case"])
        return
    inputs, outputs = case.get("inputs", ()), case.get("outputs", ())
    if len(inputs) != len(outputs):
        raise ValueError(f"ground_truth has {len(inputs)} inputs and {len(outputs)} outputs")
    function = case.get("fn_name")
    for given, expected in zip(inputs, outputs, strict=True):
        if function is None:
            yield _program_test(given, expected)
        else:
            yield _call_test(function, given, expected)


def _assertion_test(assertions: str) -> Test:
    return lambda box, limit_s: box.holds(assertions, limit_s)


def _program_test(stdin: str, expected: str) -> Test:
    def passes(box: Sandbox, limit_s: float) -> bool:
        outcome = box.run_program(stdin, limit_s)
        return not outcome.failure and _lines(outcome.output) == _lines(expected)

    return passes


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in str(text).rstrip().splitlines()]


def _call_test(function: str, given: Any, expected: Any) -> Test:
    arguments = _values(given) if isinstance(given, str) else list(given)
    if isinstance(expected, str) and isinstance(given, str):
        [expected] = _values(expected)

    def passes(box: Sandbox, limit_s: float) -> bool:
        outcome = box.call(function, arguments, limit_s)
        if outcome.failure:
            return False
        try:
            result = json.loads(outcome.output)
        except (ValueError, RecursionError):  # it wrote there itself
            return False
        return result == expected or [result] == expected

    return passes


def _values(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]
