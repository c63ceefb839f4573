"""Reward for arithmetic: the last number of the response equals the reference exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_rl.rewards.base import REWARDS, AnswerScore
from mcore_rl.rewards.ground_truth import reads
from mcore_rl.rewards.number_text import last_number, number_answer, read_numbers


@REWARDS.register("arithmetic")
@REWARDS.register("exact_number")
@reads(read_numbers)
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> AnswerScore:
    """Return 1.0 if the last number of `solution_str` equals `ground_truth`, otherwise 0.0, and
    that number.

    Raises:
        ValueError: if `ground_truth` is not one number, or a list of them.
    """
    number = last_number(solution_str)
    score = float(number in read_numbers(ground_truth))
    return {"score": score, "pred": number_answer(number)}
