"""Reward for GSM8K: the stated final answer equals the reference.

The answer is what the response states (see `answer_text`), the number that it consists of as
`number_text` reads it. A response that states none, or another expression, scores 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from mcore_rl.rewards.answer_text import stated_answer
from mcore_rl.rewards.base import REWARDS, AnswerScore
from mcore_rl.rewards.ground_truth import reads
from mcore_rl.rewards.number_text import number_answer, read_numbers, stated_number


@REWARDS.register("openai/gsm8k")
@REWARDS.register("gsm8k")
@reads(read_numbers)
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> AnswerScore:
    """Return 1.0 if the final answer of `solution_str` equals `ground_truth`, otherwise 0.0, and
    that answer.

    Raises:
        ValueError: if `ground_truth` is not one number, or a list of them.
    """
    answer = final_answer(solution_str)
    score = float(answer in read_numbers(ground_truth))
    return {"score": score, "pred": number_answer(answer)}


def final_answer(response: str) -> Fraction | None:
    """Return the number that the response states as its final answer, or None."""
    stated = stated_answer(response)
    return None if stated is None else stated_number(stated)
