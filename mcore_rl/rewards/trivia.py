"""Reward for trivia: the answer equals one of the reference answers after normalisation.

The answer is what the response states (see `answer_text`), otherwise its last line. `ground_truth`
is one answer or a list of them (aliases). The F1 is logged beside the score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcore_rl.rewards.answer_text import answer_in_words
from mcore_rl.rewards.base import REWARDS, AnswerScore
from mcore_rl.rewards.ground_truth import reads
from mcore_rl.rewards.text_match import best, exact_match, f1, normalize, read_references


class TriviaScore(AnswerScore):
    f1: float


@REWARDS.register("trivia")
@reads(read_references)
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> TriviaScore:
    """Return the exact match under "score", 1.0 or 0.0, the answer and the F1.

    Raises:
        ValueError: if `ground_truth` names no answer.
    """
    references = read_references(ground_truth)
    answer = normalize(answer_in_words(solution_str))
    return {
        "score": best(exact_match, answer, references),
        "pred": " ".join(answer),
        "f1": best(f1, answer, references),
    }
