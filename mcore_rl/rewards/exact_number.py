"""Reward for arithmetic: the last number of the response equals the reference exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_rl.rewards.base import REWARDS
from mcore_rl.rewards.number_text import find_numbers, parse_number


@REWARDS.register("arithmetic")
@REWARDS.register("exact_number")
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> float:
    """Return 1.0 if the last number of `solution_str` equals `ground_truth`, otherwise 0.0.

    Raises:
        ValueError: if `ground_truth` is not one number.
    """
    numbers = find_numbers(solution_str)
    return float(bool(numbers) and numbers[-1] == parse_number(ground_truth))
