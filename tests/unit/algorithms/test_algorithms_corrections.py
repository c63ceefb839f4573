"""Mismatch between trainer and engine, and its correction: hand-worked numbers."""

import math

import pytest
import torch

from mcore_rl.algorithms.corrections import (
    RolloutCorrectionConfig,
    mismatch_metrics,
    rollout_weights,
)
from mcore_rl.errors import UserError
from mcore_rl.metrics import to_floats
from mcore_rl.segments import Segments


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


def weights_of(ratios, **options):
    """Return (weights, metrics) of sequences with these ratios p_trainer / p_engine.

    An untrained token with a NaN stands before each sequence.
    """
    rows = [[math.nan, *map(math.log, sequence)] for sequence in ratios]
    segments = Segments.from_loss_masks([[False] + [True] * len(r) for r in ratios])
    log_ratio_T = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    rollout_T = torch.linspace(-3, -1, len(log_ratio_T), dtype=torch.float64)
    logprobs_T = (rollout_T + log_ratio_T).requires_grad_()
    cfg = RolloutCorrectionConfig(**options)
    weights_T, metrics = rollout_weights(logprobs_T, rollout_T, segments, cfg)
    assert not weights_T.requires_grad
    return weights_T[segments.mask_T].tolist(), to_floats(metrics)


RATIOS = [[4.0, 0.5], [1.5], [0.1, 6.0, 1.0]]  # products 2, 1.5, 0.6


@pytest.mark.parametrize(
    ("options", "weights", "clipped", "rejected"),
    [
        ({"rollout_is": "token"}, [2, 0.5, 1.5, 0.1, 2, 1], 2 / 6, None),
        (
            {"rollout_is": "sequence", "rollout_is_threshold": 1.8},
            [1.8, 1.8, 1.5, 0.6, 0.6, 0.6],
            2 / 6,
            None,
        ),
        (
            {"rollout_rs": "token", "rollout_rs_threshold": 5.0},
            [1, 1, 1, 0, 0, 1],  # the lower bound is 1 / 5
            None,
            2 / 6,
        ),
        (
            {
                "rollout_rs": "sequence",
                "rollout_rs_threshold": 1.6,
                "rollout_rs_threshold_lower": 0.5,
            },
            [0, 0, 1, 1, 1, 1],
            None,
            2 / 6,
        ),
        (
            {"rollout_rs": "geometric", "rollout_rs_threshold": 1.45},
            [1, 1, 0, 1, 1, 1],  # means sqrt 2, 1.5 and 0.6^(1/3) = 0.84
            None,
            1 / 6,
        ),
        (  # IcePop
            {
                "rollout_is": "token",
                "rollout_is_threshold": 5.0,
                "rollout_rs": "token",
                "rollout_rs_threshold": 5.0,
                "rollout_rs_threshold_lower": 0.5,
            },
            [4, 0.5, 1.5, 0, 0, 1],
            1 / 6,
            2 / 6,
        ),
    ],
)
def test_weights_are_truncated_and_rejected_at_their_level(options, weights, clipped, rejected):
    # 0.5 lies on a bound: exp(log 0.5) must not fall below it, so the log is that of 0.5 + 1e-9.
    ratios = [[x + 1e-9 for x in sequence] for sequence in RATIOS]
    found, metrics = weights_of(ratios, **options)
    assert found == pytest.approx(weights, rel=1e-7)
    expected = {"mismatch/is_clipped_frac": clipped, "mismatch/is_rejected_frac": rejected}
    assert metrics == pytest.approx({k: v for k, v in expected.items() if v is not None})


def test_absurd_ratios_of_a_sequence_stay_finite():
    (weight, *_), _ = weights_of([[1e8] * 5], rollout_is="sequence", rollout_is_threshold=1e12)
    assert weight == pytest.approx(math.exp(20))


@pytest.mark.parametrize(
    "options",
    [
        {"rollout_is": "token", "rollout_is_threshold": 0.5},
        {"rollout_rs": "token", "rollout_rs_threshold": 1.0},
        {"rollout_rs": "token", "rollout_rs_threshold": 2.0, "rollout_rs_threshold_lower": 0.0},
        {"rollout_rs": "token", "rollout_rs_threshold": 2.0, "rollout_rs_threshold_lower": 1.0},
    ],
)
def test_bounds_at_the_ends_of_their_range_are_taken(options):
    assert RolloutCorrectionConfig(**options).is_on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_is": "tokens"}, "Did you mean 'token'"),
        ({"rollout_is": "geometric"}, "rollout_is='geometric' is not one of token, sequence"),
        ({"rollout_is_threshold": 3.0}, r"rollout_is_threshold=3\.0 is not read with .*=null"),
        ({"rollout_is": "token", "rollout_is_threshold": 0.0}, "must be > 0"),
        ({"rollout_rs": "token"}, "rollout_rs_threshold=None must be set"),
        ({"rollout_rs_threshold": 2.0}, r"rollout_rs_threshold=2\.0 is not read with .*=null"),
        ({"rollout_rs": "token", "rollout_rs_threshold": 0.5}, "must be set and at least 1"),
        (
            {
                "rollout_rs": "token",
                "rollout_rs_threshold": 2.0,
                "rollout_rs_threshold_lower": 1.5,
            },
            r"rollout_rs_threshold_lower=1\.5 must be in \[0, 1\]",
        ),
        (
            {
                "rollout_rs": "token",
                "rollout_rs_threshold": 2.0,
                "rollout_rs_threshold_lower": -0.5,
            },
            r"rollout_rs_threshold_lower=-0\.5 must be in \[0, 1\]",
        ),
    ],
)
def test_corrections_that_make_no_sense_or_are_not_read_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        RolloutCorrectionConfig(**options)
