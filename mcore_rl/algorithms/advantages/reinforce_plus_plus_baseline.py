"""REINFORCE++ with baseline: the group's mean off the reward, then whitened over the batch.

    A = whiten(r - mean_G)

The mean that whitening takes off is over tokens, so a group with equal rewards has advantage 0 only
if that mean is 0. Source: arXiv:2501.03262, section 3. Shapes: N samples, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AdvantageInputs
from mcore_rl.algorithms.advantages.whiten import whiten
from mcore_rl.options import NoOptions

if TYPE_CHECKING:
    from torch import Tensor


@ADVANTAGES.register("reinforce_plus_plus_baseline", config=NoOptions, min_group_size=2)
def reinforce_plus_plus_baseline(inputs: AdvantageInputs, cfg: NoOptions) -> Tensor:
    """Return the whitened, centered reward of each token's sample, [T] float64."""
    segments = inputs.segments
    return whiten(segments.expand(inputs.centered_rewards_N), segments.mask_T)
