"""Reward of DAPO: 1 where the stated answer equals the reference, -1 where not.

The answer is read and compared as in `math.py`. The overlong penalty and the advantage see -1 and
1; `acc`, 1 or 0, is logged beside the score, in validation as `eval/<data source>/acc/mean`, and is
what `algorithm.filter_groups.metric=acc` compares.

Source: DAPO, arXiv:2503.14476, section 2.4. The names are those of verl's prepared data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from mcore_rl.rewards import math
from mcore_rl.rewards.base import REWARDS, AnswerScore
from mcore_rl.rewards.ground_truth import reads


class DapoScore(AnswerScore):
    acc: float


@REWARDS.register("aime*")
@REWARDS.register("HuggingFaceH4/aime_2024")
@REWARDS.register("math_dapo_reasoning")
@REWARDS.register("math_dapo")
@reads(math.read_answers)
def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping | None = None
) -> DapoScore:
    """Return 1.0 or -1.0 under "score", 1.0 or 0.0 under "acc", and the answer."""
    scored = math.compute_score(data_source, solution_str, ground_truth, extra_info)
    found = cast(AnswerScore, scored)
    return {"score": 2 * found["score"] - 1, "pred": found["pred"], "acc": found["score"]}
