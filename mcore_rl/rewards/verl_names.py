"""Rewards under the names that verl's prepared data has in its `data_source`.

Left out are `hiyouga/geometry3k`, whose prompts have images, which are not read here, and verl's
programming tasks, for which it gives partial credit.
"""

from __future__ import annotations

from mcore_rl.rewards import math
from mcore_rl.rewards.base import REWARDS

_MATH = (
    "DigitalLearningGmbH/MATH-lighteval",
    "HuggingFaceH4/MATH-500",
    "lighteval/MATH",
    "numina_amc_aime",
    "numina_aops_forum",
    "numina_cn_k12",
    "numina_olympiads",
    "numina_synthetic_amc",
    "numina_synthetic_math",
)

for _name in _MATH:
    REWARDS.add(_name, math.compute_score)
