"""What each kind of training minimizes of a packed row, by hand: two sequences of two trained
tokens and one, each after an untrained token whose numbers do not matter."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mcore_rl.algorithms.corrections import RolloutCorrectionConfig
from mcore_rl.algorithms.objective import ObjectiveConfig, resolve_objective
from mcore_rl.algorithms.objectives import CriticObjective, PolicyObjective, SftObjective
from mcore_rl.metrics import to_floats
from mcore_rl.segments import Segments
from mcore_rl.types import Denominators

NAN = math.nan
SEGMENTS = Segments.from_loss_masks([[False, True, True], [False, True]])
DENOMINATORS = Denominators(num_tokens=3, num_sequences=2)
LOGPROBS = [NAN, -1.0, -2.0, NAN, -3.0]
ADVANTAGES = [NAN, 2.0, 2.0, NAN, -1.0]


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def row(**numbers) -> Any:
    """Return a packed row that carries these numbers."""
    names = ("old_logprobs", "rollout_logprobs", "ref_logprobs", "values", "returns", "advantages")
    carried = {f"{name}_T": tensor(numbers[name]) if name in numbers else None for name in names}
    return SimpleNamespace(segments=SEGMENTS, mask_T=SEGMENTS.mask_T, **carried)


def policy(loss_mode="gpg", correction=None, log_entropy=False, **options):
    spec = resolve_objective(ObjectiveConfig.of(loss_mode, **options), max_response_length=16)
    correction = correction or RolloutCorrectionConfig()
    return PolicyObjective(spec=spec, log_entropy=log_entropy, correction=correction)


def test_a_row_without_old_logprobs_has_a_ratio_of_one():
    """The objective is the mean of -advantage, its gradient that of -advantage * logprob."""
    logprobs_T = tensor(LOGPROBS).requires_grad_()
    batch = row(advantages=ADVANTAGES)
    objective, metrics = policy("vanilla")(logprobs_T, None, batch, DENOMINATORS)
    objective.backward()
    assert objective.item() == pytest.approx(-(2 + 2 - 1) / 3)
    assert logprobs_T.grad is not None
    assert logprobs_T.grad.tolist() == pytest.approx([0, -2 / 3, -2 / 3, 0, 1 / 3])
    numbers = to_floats(metrics)
    assert numbers["actor/ppo_kl"] == 0.0
    assert not any(name.startswith("mismatch/") for name in numbers)


def test_old_logprobs_of_a_row_are_those_that_the_ratio_is_to():
    old = [NAN, -1.0 - math.log(1.1), -2.0, NAN, -3.0 + math.log(1.25)]  # ratios 1.1, 1, 0.8
    batch = row(advantages=ADVANTAGES, old_logprobs=old)
    objective, _ = policy("vanilla")(tensor(LOGPROBS), None, batch, DENOMINATORS)
    assert objective.item() == pytest.approx(-(1.1 * 2 + 2 - 0.8) / 3)


def test_the_engine_s_logprobs_of_a_row_are_compared_and_weigh_only_when_asked_to():
    engine = [NAN, -1.0 - math.log(4), -2.0, NAN, -3.0 + math.log(2)]  # weights 4, 1, 1/2
    batch = row(advantages=ADVANTAGES, old_logprobs=LOGPROBS, rollout_logprobs=engine)
    gradients = {}
    for is_on in (False, True):
        logprobs_T = tensor(LOGPROBS).requires_grad_()
        correction = RolloutCorrectionConfig(rollout_is="token", rollout_is_threshold=2.0)
        trained = policy(correction=correction if is_on else None)
        objective, metrics = trained(logprobs_T, None, batch, DENOMINATORS)
        objective.backward()
        assert logprobs_T.grad is not None
        gradients[is_on] = logprobs_T.grad.tolist()
        numbers = to_floats(metrics)
        assert numbers["mismatch/is_weight/mean"] == pytest.approx((4 + 1 + 0.5) / 3)
        clipped = {"mismatch/is_clipped_frac": pytest.approx(1 / 3)} if is_on else {}
        assert {k: v for k, v in numbers.items() if k.endswith("_frac")} == clipped
    plain = gradients[False]
    assert all(plain[i] != 0 for i in (1, 2, 4))
    assert gradients[True] == pytest.approx([0, 2 * plain[1], plain[2], 0, plain[4] / 2])


def test_only_what_is_read_is_computed():
    correction = RolloutCorrectionConfig(rollout_rs="token", rollout_rs_threshold=2.0)
    assert policy("vanilla").needs_old_logprobs
    assert not policy("gpg").needs_old_logprobs
    assert policy("gpg", correction=correction).needs_old_logprobs
    assert not policy().with_entropy
    assert policy(log_entropy=True).with_entropy
    assert policy(entropy_coeff=0.1).with_entropy
    assert not SftObjective().with_entropy
    assert not CriticObjective(0.5, "token-mean", 16.0).with_entropy


def test_the_critic_s_loss_is_half_the_larger_square_averaged_over_trained_tokens():
    values_T = tensor([NAN, 2.0, 0.25, NAN, 1.0]).requires_grad_()
    batch = row(values=[0.0, 1.0, 0.0, 0.0, 1.0], returns=[0.0, 1.0, 1.0, 0.0, 4.0])
    # The first value left [0.5, 1.5] away from its return: the unclipped square, 1, is larger.
    expected = 0.5 * ((2 - 1) ** 2 + (0.25 - 1) ** 2 + (1 - 4) ** 2) / 3
    loss, metrics = CriticObjective(0.5, "token-mean", 16.0)(values_T, None, batch, DENOMINATORS)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert values_T.grad is not None
    assert values_T.grad.tolist() == pytest.approx([0, 1 / 3, -0.75 / 3, 0, -1.0])
    assert to_floats(metrics) == pytest.approx(
        {"critic/value_loss": expected, "critic/clip_frac": 0.0}
    )


def test_a_value_that_left_the_range_towards_its_return_is_held_back_and_counted():
    values_T = tensor([NAN, 2.0, 0.0, NAN, 1.0]).requires_grad_()
    batch = row(values=[0.0, 1.0, 0.0, 0.0, 1.0], returns=[0.0, 3.0, 0.0, 0.0, 1.0])
    loss, metrics = CriticObjective(0.5, "token-mean", 16.0)(values_T, None, batch, DENOMINATORS)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (1.5 - 3) ** 2 / 3)
    assert values_T.grad is not None
    assert values_T.grad.tolist() == [0.0] * 5
    assert to_floats(metrics)["critic/clip_frac"] == pytest.approx(1 / 3)


def test_the_critic_reads_its_own_aggregation_and_factor():
    batch = row(values=[0.0] * 5, returns=[0.0, 2.0, 2.0, 0.0, 4.0])
    objective = CriticObjective(9.0, "seq-mean-token-sum-norm", 5.0)
    loss, _ = objective(torch.zeros(5, dtype=torch.float64), None, batch, DENOMINATORS)
    assert loss.item() == pytest.approx((0.5 * (4 + 4) + 0.5 * 16) / 2 / 5)


def test_fine_tuning_minimizes_the_mean_negative_log_likelihood():
    loss, metrics = SftObjective()(tensor(LOGPROBS), None, row(), DENOMINATORS)
    assert loss.item() == pytest.approx((1 + 2 + 3) / 3)
    assert to_floats(metrics) == {"sft/loss": pytest.approx(2.0)}
