"""Reward for question answering: word overlap (F1) with the best of the reference answers.

The answer is what the response states (see `answer_text`), otherwise its last line. `ground_truth`
is one answer or a list of them. The exact match is logged beside the score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_rl.rewards.answer_text import answer_in_words
from mcore_rl.rewards.base import REWARDS, AnswerScore
from mcore_rl.rewards.ground_truth import reads
from mcore_rl.rewards.text_match import best, exact_match, f1, normalize, read_references


class QaScore(AnswerScore):
    exact_match: float


@REWARDS.register("qa")
@reads(read_references)
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> QaScore:
    """Return the F1 under "score", within [0, 1], the answer and the exact match.

    Raises:
        ValueError: if `ground_truth` names no answer.
    """
    references = read_references(ground_truth)
    answer = normalize(answer_in_words(solution_str))
    return {
        "score": best(f1, answer, references),
        "pred": " ".join(answer),
        "exact_match": best(exact_match, answer, references),
    }
