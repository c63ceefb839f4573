"""Reward for word problems: the number that the response arrives at equals the reference.

Of a stated answer (see `answer_text`) the first number counts; where none is stated, the last
number of the response. Numbers are compared as exact decimals, so 3.0 equals 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_rl.rewards.answer_text import stated_answer
from mcore_rl.rewards.base import REWARDS
from mcore_rl.rewards.number_text import find_numbers, parse_number


@REWARDS.register("math_reasoning")
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> float:
    """Return 1.0 if the number of `solution_str` equals `ground_truth`, otherwise 0.0.

    Raises:
        ValueError: if `ground_truth` is not one number.
    """
    stated = stated_answer(solution_str)
    found = find_numbers(solution_str)[-1:] if stated is None else find_numbers(stated)[:1]
    return float(found == [parse_number(ground_truth)])
