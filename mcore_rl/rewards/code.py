"""Reward for programs: the Python code of the response passes every test, in a sandbox.

The program is the last Python block of the response, otherwise its last block (`code_block.py`);
without either the score is 0. `ground_truth` is a mapping, or its JSON, in one of the forms of
verl's data:

    {"inputs": ["1 2\\n", ...], "outputs": ["3\\n", ...]}                programs: stdin to stdout
    {"fn_name": "add", "inputs": [[1, 2], ...], "outputs": [3, ...]}   a function, or of `Solution`
    {"assert_case": ["assert add(1, 2) == 3", ...]}                    assertions about the program

No form lets the program see what is expected: it is compared with what came out of the program's
process, as data, so that nothing but the right answer scores.

- Outputs are equal if their lines are, without white space at the ends of lines and of the whole;
  a number that is expected with a decimal point may differ by 1e-6, absolute or relative, as judges
  of programming contests have it. Inputs and outputs may be lists of lines.
- Results of a function are compared as JSON, so tuples are lists; True is not 1; floats as above.
  An expected result may stand alone in a list, as in APPS (arXiv:2105.09938). Inputs of a function
  may be text with one JSON value per line.
- Assertions are taken apart (`assertions.py`), and the values of the program compared by type and
  value, exactly. What cannot be taken apart is refused unless
  `reward.sandbox.share_assertions` accepts that the program can deceive it.

Tests run until one fails.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mcore_rl.foreign_json import parse_json
from mcore_rl.jail.plain_data import is_same
from mcore_rl.rewards.assertions import SplitAssertions, split_assertions
from mcore_rl.rewards.base import REWARDS, SandboxConfig
from mcore_rl.rewards.code_block import last_program
from mcore_rl.rewards.ground_truth import reads
from mcore_rl.rewards.sandbox import Outcome, Sandbox

Test = Callable[[Sandbox, Sandbox, float], bool]
"""Runs in the program's sandbox and in one without a program, within a number of seconds; whether
the program passed."""

_NOTHING = object()
_TOLERANCE = 1e-6
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_LONGEST_NUMBER = 400


def read_tests(ground_truth: Any, sandbox: SandboxConfig) -> list[Test]:
    """Return the tests of a row.

    Raises:
        ValueError: if it has none of the forms above, or no tests, or assertions that only a
            program trusted not to deceive can be given.
    """
    case = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    if not isinstance(case, Mapping):
        raise ValueError(f"ground_truth {str(ground_truth)[:80]!r} is no mapping of tests")
    tests = list(_tests(case, sandbox))
    if not tests:
        raise ValueError(f"ground_truth has no tests; its keys are {sorted(case)}")
    return tests


@REWARDS.register("code_generation")
@REWARDS.register("code")
@reads(lambda ground_truth, sandbox: read_tests(ground_truth, sandbox))
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
    tests = read_tests(ground_truth, sandbox)
    program = last_program(solution_str)
    if program is None:
        return 0.0
    until = time.monotonic() + sandbox.timeout_s
    with Sandbox(program, sandbox) as box, Sandbox("", sandbox) as judge:
        for test in tests:
            left = min(sandbox.test_timeout_s, until - time.monotonic())
            if left <= 0 or not test(box, judge, left):
                return 0.0
    return 1.0


def _tests(case: Mapping[str, Any], sandbox: SandboxConfig) -> Iterator[Test]:
    if (assertions := case.get("assert_case")) is not None and len(assertions):
        yield from _assertion_tests(_texts(assertions), sandbox)
        return
    inputs, outputs = case.get("inputs"), case.get("outputs")
    inputs, outputs = (() if side is None else side for side in (inputs, outputs))
    if len(inputs) != len(outputs):
        raise ValueError(f"ground_truth has {len(inputs)} inputs and {len(outputs)} outputs")
    function = case.get("fn_name")
    for given, expected in zip(inputs, outputs, strict=True):
        if function is None:
            yield _program_test(_text(given), _text(expected))
        else:
            yield _call_test(function, given, expected)


def _texts(assertions: Any) -> list[str]:
    return [assertions] if isinstance(assertions, str) else list(assertions)


def _assertion_tests(texts: Sequence[str], sandbox: SandboxConfig) -> Iterator[Test]:
    for text, parts in zip(texts, split_assertions(texts), strict=True):
        if isinstance(parts, SplitAssertions):
            yield _split_test(parts)
        elif sandbox.share_assertions:
            yield _shared_test(text)
        else:
            raise ValueError(
                f"{parts}; a program could pass it without work, which "
                "reward.sandbox.share_assertions=true accepts"
            )


def _shared_test(assertions: str) -> Test:
    return lambda box, judge, limit_s: box.holds(assertions, limit_s)


def _split_test(assertions: SplitAssertions) -> Test:
    def passes(box: Sandbox, judge: Sandbox, limit_s: float) -> bool:
        until = time.monotonic() + limit_s
        outcome = box.evaluate(assertions.steps, limit_s)
        values = _json(outcome)
        if not isinstance(values, list):
            return False
        if assertions.literals is not None:
            return is_same(values, assertions.literals)
        left = until - time.monotonic()
        return left > 0 and judge.judge(assertions.verdict, values, left)

    return passes


def _program_test(stdin: str, expected: str) -> Test:
    lines = _lines(expected)

    def passes(box: Sandbox, judge: Sandbox, limit_s: float) -> bool:
        outcome = box.run_program(stdin, limit_s)
        return not outcome.failure and _are_equal_lines(_lines(outcome.output), lines)

    return passes


def _text(content: Any) -> str:
    """Return the input or output of a test as text. It may be a list of lines; lines may be
    numbers."""
    if isinstance(content, list | tuple):
        return "\n".join(str(line).rstrip("\r\n") for line in content)
    if isinstance(content, Mapping) or content is None:
        raise ValueError(f"ground_truth has {content!r} for an input or output of a program")
    return str(content)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _are_equal_lines(lines: Sequence[str], expected: Sequence[str]) -> bool:
    return len(lines) == len(expected) and all(map(_is_equal_line, lines, expected))


def _is_equal_line(line: str, expected: str) -> bool:
    if line == expected:
        return True
    words, expected_words = line.split(), expected.split()
    return len(words) == len(expected_words) and all(map(_is_equal_word, words, expected_words))


def _is_equal_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if expected.lstrip("+-").isdigit() or max(len(word), len(expected)) > _LONGEST_NUMBER:
        return False
    if not _NUMBER.fullmatch(expected) or not _NUMBER.fullmatch(word):
        return False
    return math.isfinite(float(expected)) and is_same(float(word), float(expected), _TOLERANCE)


def _call_test(function: str, given: Any, expected: Any) -> Test:
    arguments = _values(given) if isinstance(given, str) else list(given)
    if isinstance(expected, str) and isinstance(given, str):
        [expected] = _values(expected)

    def passes(box: Sandbox, judge: Sandbox, limit_s: float) -> bool:
        result = _json(box.call(function, arguments, limit_s))
        return any(is_same(r, expected, _TOLERANCE) for r in (result, [result]))

    return passes


def _values(text: str) -> list[Any]:
    return [parse_json(line) for line in text.splitlines() if line.strip()]


def _json(outcome: Outcome) -> Any:
    """Return the result of the program's process; if there is none, a value that equals nothing."""
    if outcome.failure:
        return _NOTHING
    try:
        return json.loads(outcome.output)
    except (ValueError, RecursionError):  # it ended without one, or wrote there itself
        return _NOTHING
