"""Advantage estimators, one file each, chosen by `algorithm.adv_estimator`.

To add one: a file with a dataclass of its options, a function of (`AdvantageInputs`, those options)
under `@ADVANTAGES.register("<name>", config=<that dataclass>)`, and a line below. Its options are
keys of the section `algorithm`.
"""

from mcore_rl.algorithms.advantages import (
    gae,
    gpg,
    grpo,
    grpo_passk,
    opo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rloo,
)
from mcore_rl.algorithms.advantages.assign import assign_advantages
from mcore_rl.algorithms.advantages.base import (
    ADVANTAGES,
    AdvantageEstimator,
    AdvantageInputs,
    AlgorithmConfig,
)

__all__ = [
    "ADVANTAGES",
    "AdvantageEstimator",
    "AdvantageInputs",
    "AlgorithmConfig",
    "assign_advantages",
    "gae",
    "gpg",
    "grpo",
    "grpo_passk",
    "opo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
]
