"""What a test of one's own estimator can look like: python -m pytest examples/custom_estimator"""

import group_median
import pytest
import torch

from mcore_rl.algorithms.advantages import AdvantageInputs
from mcore_rl.segments import Segments


@pytest.mark.parametrize(
    ("rewards", "limit", "expected"),
    [
        ([0.0, 1.0, 5.0], 9.0, [-1.0, 0.0, 4.0]),
        ([0.0, 1.0, 5.0], 2.0, [-1.0, 0.0, 2.0]),
        ([3.0, 0.0, 2.0, 1.0], 9.0, [2.0, -1.0, 1.0, 0.0]),
        ([0.1, 0.1, 0.1], 9.0, [0.0, 0.0, 0.0]),
    ],
)
def test_an_advantage_is_the_distance_to_the_median_of_the_group(rewards, limit, expected):
    """A second group, between the samples of the first, changes nothing."""
    together = [x for reward in rewards for x in (reward, 100 - reward)]
    inputs = AdvantageInputs(
        rewards_N=torch.tensor(together, dtype=torch.float64),
        group_N=torch.tensor([0, 1] * len(rewards)),
        segments=Segments.from_loss_masks([[False, True]] * len(together)),
        num_response_tokens_N=torch.full([len(together)], 2.0, dtype=torch.float64),
    )
    cfg = group_median.GroupMedianConfig(advantage_limit=limit)
    advantages_T = group_median.group_median(inputs, cfg)
    assert advantages_T[1::4].tolist() == expected
    assert advantages_T[::2].tolist() == [0.0] * len(together)  # tokens of the prompts
