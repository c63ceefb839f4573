"""Reward for classification: the stated label is the reference label.

The label is what the response states (see `answer_text`), otherwise its last line. Case, white
space around it and brackets or quotation marks around it do not matter: "(B)" is b. Nothing else
is dropped, so labels may be articles ("A") and signs ("C++").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_rl.rewards.answer_text import answer_or_last_line
from mcore_rl.rewards.base import REWARDS

_AROUND = "()[]{}\"'`"


@REWARDS.register("classification")
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> float:
    """Return 1.0 if the label of `solution_str` is `ground_truth`, otherwise 0.0.

    Raises:
        ValueError: if `ground_truth` is empty.
    """
    expected = _label(str(ground_truth))
    if not expected:
        raise ValueError(f"ground_truth {ground_truth!r} is no label")
    return float(_label(answer_or_last_line(solution_str)) == expected)


def _label(text: str) -> str:
    return " ".join(text.strip().strip(_AROUND).split()).casefold()
