r"""Reward for GSM8K: the stated final answer equals the reference.

A final answer is stated after `####`, in `\boxed{}`, or after "the answer is" or "Answer:"; the
first of these three kinds that occurs decides, by its last occurrence. Only the first number after
it on its line (in a box, the only number) is read, so listing guesses earns nothing. A response
without any of them scores 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from mcore_rl.rewards.answer_text import inside_box
from mcore_rl.rewards.base import REWARDS
from mcore_rl.rewards.number_text import find_numbers, parse_number

_HASHES = re.compile(r"\#\#\#\#")
_BOX = re.compile(r"\\boxed\s*\{")
_WORDS = re.compile(r"answer\s*(?:is\b|:)", re.IGNORECASE)


@REWARDS.register("openai/gsm8k")
@REWARDS.register("gsm8k")
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> float:
    """Return 1.0 if the final answer of `solution_str` equals `ground_truth`, otherwise 0.0.

    Raises:
        ValueError: if `ground_truth` is not one number.
    """
    return float(final_answer(solution_str) == parse_number(ground_truth))


def final_answer(response: str) -> Decimal | None:
    """Return the number that the response states as its final answer, or None."""
    for mark, read in ((_HASHES, _first_on_line), (_BOX, _only_in_box), (_WORDS, _first_on_line)):
        ends = [match.end() for match in mark.finditer(response)]
        if ends:
            return read(response[ends[-1] :])
    return None


def _first_on_line(rest: str) -> Decimal | None:
    numbers = find_numbers(rest.lstrip().partition("\n")[0])
    return numbers[0] if numbers else None


def _only_in_box(rest: str) -> Decimal | None:
    numbers = find_numbers(inside_box(rest))
    return numbers[0] if len(numbers) == 1 else None
