"""A reward of one's own: the share of digits of a number that a response has in their places.

Rows choose it by `data_source` "digits_right". Importing the module registers the reward;
`MCORE_RL_PLUGINS` has every process import it. No torch: rewards run in processes without it.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

from mcore_rl.rewards.base import REWARDS
from mcore_rl.rewards.ground_truth import any_of, reads, text_of


class DigitScore(TypedDict):
    """Numbers beside `score` are logged by name: `reward/is_number/mean`."""

    score: float
    is_number: float
    pred: str


def read_numbers(ground_truth: Any) -> list[str]:
    """Return the acceptable numbers of a row. It is called for every row before the run starts.

    Raises:
        ValueError: if there is none, or one is no whole number; the run names the row.
    """
    return any_of(ground_truth, _read_number)


@REWARDS.register("digits_right")
@reads(read_numbers)
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> DigitScore:
    """Return the share of digits that are right, counted from the last one; the best of a list."""
    said = solution_str.strip()
    score = max(_share(said, number) for number in read_numbers(ground_truth))
    return {"score": score, "is_number": float(said.isdecimal()), "pred": said}


def _share(said: str, number: str) -> float:
    pairs = zip(reversed(said), reversed(number), strict=False)
    return sum(a == b for a, b in pairs) / max(len(said), len(number))


def _read_number(value: Any) -> str:
    number = text_of(value)
    if not number.isdecimal():
        raise ValueError(f"ground_truth {value!r} is no whole number")
    return number
