"""Mismatch between trainer and engine: hand-worked numbers."""

import math

import pytest
import torch

from mcore_rl.algorithms.corrections import mismatch_metrics
from mcore_rl.metrics import to_floats


def test_mismatch_metrics_are_worked_by_hand_over_the_masked_tokens():
    rollout_T = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    log_ratio_T = torch.tensor([math.log(2.0), math.log(0.25), math.nan], dtype=torch.float64)
    mask_T = torch.tensor([True, True, False])
    numbers = to_floats(mismatch_metrics(rollout_T + log_ratio_T, rollout_T, mask_T))
    expected = {
        "mismatch/logprob_abs_diff/mean": (math.log(2) + math.log(4)) / 2,
        "mismatch/logprob_abs_diff/max": math.log(4),
        # mean of r - 1 - log r for r = 2 and 1/4
        "mismatch/k3_kl": ((2 - 1 - math.log(2)) + (0.25 - 1 + math.log(4))) / 2,
        "mismatch/is_weight/mean": (2 + 0.25) / 2,
    }
    assert numbers == pytest.approx(expected, rel=1e-6)  # metrics are float32


def test_agreement_is_zero_distance_and_weight_one():
    logprobs_T = torch.tensor([-1.0, -0.5])
    numbers = to_floats(mismatch_metrics(logprobs_T, logprobs_T, torch.tensor([True, True])))
    assert numbers == {
        "mismatch/logprob_abs_diff/mean": 0.0,
        "mismatch/logprob_abs_diff/max": 0.0,
        "mismatch/k3_kl": 0.0,
        "mismatch/is_weight/mean": 1.0,
    }
