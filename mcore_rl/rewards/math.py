r"""Reward for mathematics: the stated answer equals the reference as an expression.

The answer is read as `answer_text` says and compared with the reference by the library math-verify
(github.com/huggingface/Math-Verify), which parses LaTeX into sympy: `\dfrac12`, `0.5` and
`\frac{1}{2}` are equal, and so are sets in any order and numbers with and without their unit.
Texts that are equal but for white space need no parsing.

A response can hold what no parser or simplifier ends on (`9^{9^{9^9}}`), so the comparison is
forked off and has a few seconds of CPU time and a limit on its memory; beyond them the answer is
wrong. The library's own limits are off: signals do not interrupt what sympy computes in C.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from mcore_rl.rewards.answer_text import stated_answer
from mcore_rl.rewards.base import REWARDS
from mcore_rl.rewards.forked import call_forked

_CPU_S = 5
_LIMIT_S = 20.0
_MEMORY_BYTES = 2 * 2**30


@REWARDS.register("math")
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> float:
    """Return 1.0 if the stated answer of `solution_str` equals `ground_truth`, otherwise 0.0."""
    answer, reference = stated_answer(solution_str), str(ground_truth).strip()
    if not answer:
        return 0.0
    if "".join(answer.split()) == "".join(reference.split()):
        return 1.0
    _parse(reference)  # kept for every sample of the prompt, and it warms the parser up
    equal = call_forked(
        is_equal,
        answer,
        reference,
        cpu_s=_CPU_S,
        limit_s=_LIMIT_S,
        memory_bytes=_MEMORY_BYTES,
    )
    return float(bool(equal))


def is_equal(answer: str, reference: str) -> bool:
    """Return whether two LaTeX expressions are equal; may take forever."""
    from math_verify import verify

    return verify(_parse(reference), _parse(answer.strip()), timeout_seconds=None)


@functools.lru_cache(maxsize=4096)
def _parse(latex: str) -> list:
    """Return what math-verify reads in `latex`, empty where it reads nothing."""
    from math_verify import LatexExtractionConfig, parse  # sympy: a second, so only when needed

    # It warns at each start that its own limits are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(f"${latex}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=0)
