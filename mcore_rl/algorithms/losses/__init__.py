"""Policy losses, one file each, chosen by `actor.policy_loss.loss_mode`.

To add one: a file with a function of (`PolicyLossInputs`, `ClipBounds`) and `POLICY_LOSSES.add`,
and a line below. A loss returns one value per token; it does not mask, average, scale or read a
process group (`aggregate.py`, `objective.py` and `segments.py` do).
"""

from mcore_rl.algorithms.losses import cispo, geo_mean, gpg, gspo, sapo, vanilla
from mcore_rl.algorithms.losses.base import (
    POLICY_LOSSES,
    ClipBounds,
    PolicyLoss,
    PolicyLossConfig,
    PolicyLossInputs,
    TokenLoss,
    resolve_clip,
)

__all__ = [
    "POLICY_LOSSES",
    "ClipBounds",
    "PolicyLoss",
    "PolicyLossConfig",
    "PolicyLossInputs",
    "TokenLoss",
    "resolve_clip",
    "cispo",
    "geo_mean",
    "gpg",
    "gspo",
    "sapo",
    "vanilla",
]
