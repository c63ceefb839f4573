"""What a test of one's own loss can call: python -m pytest examples/custom_loss"""

import pytest
import smooth_ratio

from mcore_rl.algorithms.losses.check import check_loss


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_the_loss_does_not_depend_on_micro_batches(strength):
    check_loss("smooth_ratio", smooth_ratio.SmoothRatioConfig(penalty_strength=strength))
