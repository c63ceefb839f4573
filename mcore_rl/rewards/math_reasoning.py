"""Reward for word problems: the number that the response arrives at equals the reference.

A stated answer counts (see `answer_text`), the number that it consists of; where none is stated,
the last number of the response. Numbers are compared exactly, so 3.0 equals 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_rl.rewards.answer_text import stated_answer
from mcore_rl.rewards.base import REWARDS, AnswerScore
from mcore_rl.rewards.ground_truth import reads
from mcore_rl.rewards.number_text import (
    last_number,
    number_answer,
    read_numbers,
    stated_number,
)


@REWARDS.register("math_reasoning")
@reads(read_numbers)
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> AnswerScore:
    """Return 1.0 if the number of `solution_str` equals `ground_truth`, otherwise 0.0, and that
    number.

    Raises:
        ValueError: if `ground_truth` is not one number, or a list of them.
    """
    stated, expected = stated_answer(solution_str), read_numbers(ground_truth)
    found = last_number(solution_str) if stated is None else stated_number(stated)
    return {"score": float(found in expected), "pred": number_answer(found)}
