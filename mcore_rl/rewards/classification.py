"""Reward for classification: the stated label is the reference label.

The label is what the response states (see `answer_text`), otherwise its last line. Case, white
space around it and brackets, quotation marks or LaTeX's text commands around it do not matter:
"(B)" is b. Nothing else is dropped, so labels may be articles ("A") and signs ("C++"). A reference
of 1.0 is the label 1, as of a column of integers with missing values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_rl.rewards.answer_text import answer_in_words
from mcore_rl.rewards.base import REWARDS, AnswerScore
from mcore_rl.rewards.ground_truth import any_of, reads, text_of

_AROUND = "()[]{}\"'`"


def read_labels(ground_truth: Any) -> list[str]:
    """Return the acceptable labels of a row.

    Raises:
        ValueError: if there is none, or one is empty.
    """
    return any_of(ground_truth, _read_label)


@REWARDS.register("classification")
@reads(read_labels)
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> AnswerScore:
    """Return 1.0 if the label of `solution_str` is `ground_truth`, otherwise 0.0, and that label.

    Raises:
        ValueError: if `ground_truth` is empty.
    """
    label = _label(answer_in_words(solution_str))
    return {"score": float(label in read_labels(ground_truth)), "pred": label}


def _read_label(value: Any) -> str:
    label = _label(text_of(value))
    if not label:
        raise ValueError(f"ground_truth {value!r} is no label")
    return label


def _label(text: str) -> str:
    # A period may stand within the brackets or after them.
    return " ".join(text.strip().strip(_AROUND).removesuffix(".").split()).casefold()
