"""Policy losses, one file each, chosen by `actor.policy_loss.loss_mode`.

To add one: a file with a dataclass of its options, a function of (`PolicyLossInputs`, those
options) under `@POLICY_LOSSES.register("<name>", config=<that dataclass>)`, and a line below. Its
options are keys of the section `actor`. A loss returns one value per token; it does not mask,
average, scale, weigh by the rollout correction or read a process group (`aggregate.py`,
`objective.py` and `segments.py` do). `check.py` tests that it does not depend on micro-batches.
"""

from mcore_rl.algorithms.losses import cispo, geo_mean, gpg, gspo, sapo, vanilla
from mcore_rl.algorithms.losses.base import (
    POLICY_LOSSES,
    ClipConfig,
    PolicyLoss,
    PolicyLossConfig,
    PolicyLossInputs,
    TokenLoss,
)

__all__ = [
    "POLICY_LOSSES",
    "ClipConfig",
    "PolicyLoss",
    "PolicyLossConfig",
    "PolicyLossInputs",
    "TokenLoss",
    "cispo",
    "geo_mean",
    "gpg",
    "gspo",
    "sapo",
    "vanilla",
]
