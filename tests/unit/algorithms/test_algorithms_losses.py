"""Policy losses: which side is clipped, what passes gradient, rollout weights, clip options."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.algorithms.losses import (
    POLICY_LOSSES,
    PolicyLossConfig,
    PolicyLossInputs,
    TokenLoss,
)
from mcore_rl.algorithms.losses.check import objective_spec
from mcore_rl.algorithms.losses.sft import sft
from mcore_rl.algorithms.objective import ObjectiveConfig, actor_objective
from mcore_rl.errors import UserError
from mcore_rl.metrics import to_floats
from mcore_rl.options import NoOptions
from mcore_rl.segments import Segments
from mcore_rl.types import Denominators


def one_sequence(log_ratios, advantage, rollout_weights=None):
    """Return (inputs, logprobs_T leaf) of one sequence with these log-ratios, all trained."""
    n = len(log_ratios)
    old_T = torch.linspace(-3, -1, n, dtype=torch.float64)
    logprobs_T = (old_T + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_()
    inputs = PolicyLossInputs(
        logprobs_T=logprobs_T,
        old_logprobs_T=old_T,
        advantages_T=torch.full((n,), advantage, dtype=torch.float64),
        rollout_weights_T=rollout_weights,
        segments=Segments(
            sequence_T=torch.zeros(n, dtype=torch.int64),
            mask_T=torch.ones(n, dtype=torch.bool),
            num_tokens_S=torch.tensor([float(n)], dtype=torch.float64),
        ),
    )
    return inputs, logprobs_T


def loss_and_gradient(loss_mode, options, *args):
    inputs, logprobs_T = one_sequence(*args)
    loss = POLICY_LOSSES.get(loss_mode)
    token_loss = loss.compute(inputs, loss.config(**options))
    (gradient_T,) = torch.autograd.grad(token_loss.loss_T.sum(), logprobs_T)
    return token_loss.loss_T.detach(), gradient_T, to_floats(token_loss.metrics)


def close(actual, expected):
    # float64, closed forms of a few operations.
    return torch.allclose(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_vanilla_clips_only_the_side_that_the_advantage_favours():
    clip = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 3.0}
    up, down = math.log(1.5), math.log(0.5)
    loss_T, gradient_T, metrics = loss_and_gradient("vanilla", clip, [up, down, 0.0], 2.0)
    assert close(loss_T, [-2 * 1.3, -2 * 0.5, -2.0])
    assert close(gradient_T, [0.0, -2 * 0.5, -2.0])
    assert metrics["actor/clip_frac"] == pytest.approx(1 / 3)
    loss_T, gradient_T, metrics = loss_and_gradient("vanilla", clip, [up, down, 0.0], -2.0)
    assert close(loss_T, [2 * 1.5, 2 * 0.8, 2.0])
    assert close(gradient_T, [2 * 1.5, 0.0, 2.0])
    assert metrics["actor/clip_frac"] == pytest.approx(1 / 3)


def test_vanilla_dual_clip_bounds_the_loss_of_a_negative_advantage_only():
    clip = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0}
    loss_T, gradient_T, metrics = loss_and_gradient("vanilla", clip, [math.log(5.0), 0.0], -2.0)
    assert close(loss_T, [2 * 3.0, 2.0])
    assert close(gradient_T, [0.0, 2.0])
    assert metrics["actor/clip_frac_lower"] == pytest.approx(0.5)
    loss_T, _, metrics = loss_and_gradient("vanilla", clip, [math.log(5.0), 0.0], 2.0)
    assert close(loss_T, [-2 * 1.2, -2.0])
    assert metrics["actor/clip_frac_lower"] == 0


def test_vanilla_cuts_absurd_log_ratios_before_they_overflow():
    clip = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 1e9}
    loss_T, gradient_T, _ = loss_and_gradient("vanilla", clip, [800.0], -1.0)
    assert close(loss_T, [math.exp(20.0)])
    assert gradient_T.tolist() == [0.0]


@given(
    log_ratios=st.lists(st.floats(-2, 2), min_size=1, max_size=8),
    advantage=st.floats(-3, 3),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
)
def test_geo_mean_is_its_formula_with_the_two_sided_cut_written_out(
    log_ratios, advantage, low, high
):
    loss_T, gradient_T, metrics = loss_and_gradient(
        "geo_mean", {"clip_ratio_low": low, "clip_ratio_high": high}, log_ratios, advantage
    )
    # The ratio is formed as the loss forms it, so that a token at a bound falls on the same side.
    inputs, _ = one_sequence(log_ratios, advantage)
    assert inputs.old_logprobs_T is not None
    d = (inputs.logprobs_T - inputs.old_logprobs_T).tolist()
    cut = [min(max(x, -low), high) for x in d]
    e = [min(x, c) if advantage >= 0 else max(x, c) for x, c in zip(d, cut, strict=True)]
    ratio = math.exp(math.fsum(e) / len(e))
    assert close(loss_T, [-advantage * ratio] * len(d))
    # Summed over tokens with weight 1/n this is the sequence's loss: each uncut token gets 1/n of
    # its gradient, a cut one gets nothing but still counts in n.
    passes = [float(x == y) for x, y in zip(d, e, strict=True)]
    expected = torch.tensor([-advantage * ratio * p for p in passes], dtype=torch.float64)
    assert torch.allclose(gradient_T, expected, rtol=1e-12, atol=1e-300)
    assert metrics["actor/clip_frac"] == pytest.approx(1 - sum(passes) / len(d), abs=1e-6)
    assert metrics["actor/seq_ratio/max"] == pytest.approx(ratio, rel=1e-6)


def test_geo_mean_cut_token_stays_in_the_exponent_and_in_the_count():
    clip = {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}
    loss_T, gradient_T, metrics = loss_and_gradient("geo_mean", clip, [1.0, -0.2], 1.0)
    ratio = math.exp((0.4 - 0.2) / 2)
    assert close(loss_T, [-ratio, -ratio])
    assert close(gradient_T, [0.0, -ratio])
    assert metrics["actor/clip_frac"] == pytest.approx(0.5)
    assert metrics["actor/clip_frac_lower"] == 0


def test_geo_mean_cuts_only_low_ratios_when_the_advantage_is_negative():
    clip = {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4}
    _, gradient_T, metrics = loss_and_gradient("geo_mean", clip, [1.0, -1.0], -1.0)
    assert close(gradient_T, [math.exp((1.0 - 0.3) / 2), 0.0])
    assert metrics["actor/clip_frac"] == metrics["actor/clip_frac_lower"] == pytest.approx(0.5)


def test_geo_mean_bounds_of_0_4_are_ratios_of_0_670_and_1_492():
    clip = {}
    loss_T, _, _ = loss_and_gradient("geo_mean", clip, [5.0, 5.0], 1.0)
    assert -loss_T[0].item() == pytest.approx(1.492, abs=5e-4)
    loss_T, _, _ = loss_and_gradient("geo_mean", clip, [-5.0, -5.0], -1.0)
    assert loss_T[0].item() == pytest.approx(0.670, abs=5e-4)


def test_gspo_gives_each_token_the_ratio_of_the_sequence_and_its_own_gradient():
    clip = {"clip_ratio_low": 0.5, "clip_ratio_high": 0.5}
    loss_T, gradient_T, metrics = loss_and_gradient("gspo", clip, [0.3, -0.1], 2.0)
    ratio = math.exp(0.1)
    assert close(loss_T, [-2 * ratio] * 2)
    assert close(gradient_T, [-2 * ratio] * 2)
    assert metrics["actor/seq_ratio/max"] == pytest.approx(ratio, rel=1e-6)


def test_gspo_clips_whole_sequences_on_one_side():
    clip = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05}
    loss_T, gradient_T, metrics = loss_and_gradient("gspo", clip, [0.3, -0.1], 2.0)
    assert close(loss_T, [-2 * 1.05] * 2)
    assert gradient_T.tolist() == [0.0, 0.0]
    assert metrics["actor/clip_frac"] == 1
    _, gradient_T, metrics = loss_and_gradient("gspo", clip, [0.3, -0.1], -2.0)
    assert close(gradient_T, [2 * math.exp(0.1)] * 2)
    assert metrics["actor/clip_frac"] == 0


def test_gspo_cuts_absurd_sequence_ratios_before_they_overflow():
    clip = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05}
    loss_T, gradient_T, _ = loss_and_gradient("gspo", clip, [800.0, 900.0], -1.0)
    assert close(loss_T, [math.exp(10.0)] * 2)
    assert gradient_T.tolist() == [0.0, 0.0]


def test_gpg_is_the_plain_policy_gradient_without_old_logprobs():
    inputs = PolicyLossInputs(
        logprobs_T=torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True),
        advantages_T=torch.tensor([3.0, -1.0], dtype=torch.float64),
        segments=one_sequence([0.0, 0.0], 1.0)[0].segments,
    )
    loss_T = POLICY_LOSSES.get("gpg").compute(inputs, NoOptions()).loss_T
    assert loss_T.tolist() == [3.0, -2.0]
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), inputs.logprobs_T)
    assert gradient_T.tolist() == [-3.0, 1.0]


def test_cispo_bounds_the_weight_and_lets_every_token_train():
    clip = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.5}
    ratios = [3.0, 1.1, 0.1]
    loss_T, gradient_T, metrics = loss_and_gradient(
        "cispo", clip, [math.log(r) for r in ratios], -2.0
    )
    _, logprobs_T = one_sequence([math.log(r) for r in ratios], -2.0)
    assert close(gradient_T, [2 * 1.5, 2 * 1.1, 2 * 0.8])
    assert close(loss_T, gradient_T * logprobs_T.detach())
    assert metrics["actor/clip_frac"] == pytest.approx(2 / 3)


def test_cispo_by_default_leaves_small_weights_as_they_are():
    clip = {}
    _, gradient_T, _ = loss_and_gradient("cispo", clip, [-5.0, 5.0], 1.0)
    assert close(gradient_T, [-math.exp(-5.0), -5.0])


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.3), (-2.0, 3.0)])
def test_sapo_gates_the_ratio_with_the_temperature_of_the_sign(advantage, tau):
    log_ratios = [0.0, 0.7, -0.9]
    loss_T, gradient_T, _ = loss_and_gradient(
        "sapo", {"tau_pos": 1.3, "tau_neg": 3.0}, log_ratios, advantage
    )
    gates = [1 / (1 + math.exp(-tau * (math.exp(d) - 1))) for d in log_ratios]
    assert close(loss_T, [-advantage * gate * 4 / tau for gate in gates])
    # d loss / d logprob = -A * 4 gate (1 - gate) * r; 4 gate (1 - gate) is 1 at r = 1.
    slopes = [4 * g * (1 - g) * math.exp(d) for g, d in zip(gates, log_ratios, strict=True)]
    assert close(gradient_T, [-advantage * slope for slope in slopes])
    assert gradient_T[0].item() == pytest.approx(-advantage, rel=1e-12)


@pytest.mark.parametrize("loss_mode", ["cispo", "sapo"])
def test_absurd_log_ratios_do_not_overflow(loss_mode):
    clip = {}
    loss_T, gradient_T, _ = loss_and_gradient(loss_mode, clip, [800.0, -800.0], -1.0)
    assert loss_T.isfinite().all()
    assert gradient_T.isfinite().all()


def objective_and_gradient(loss_mode, weights):
    """Return the value of a sequence of two tokens, and its gradient, under rollout weights."""
    inputs, logprobs_T = one_sequence([0.05, -0.1], -1.5)
    objective, _ = actor_objective(
        inputs,
        rollout_weights_T=None if weights is None else torch.tensor(weights, dtype=torch.float64),
        denominators=Denominators(num_tokens=2, num_sequences=1),
        spec=objective_spec(loss_mode, "token-mean"),
    )
    (gradient_T,) = torch.autograd.grad(objective, logprobs_T)
    return objective.item(), gradient_T


@pytest.mark.parametrize("loss_mode", POLICY_LOSSES)
def test_no_loss_can_lose_the_rollout_weights(loss_mode):
    """They are applied outside of the loss, which neither sees nor can forget them."""
    value, plain_T = objective_and_gradient(loss_mode, None)
    halves, halved_T = objective_and_gradient(loss_mode, [0.5, 0.5])
    assert halves == pytest.approx(value / 2, rel=1e-12)
    assert close(halved_T, plain_T / 2)
    none, nothing_T = objective_and_gradient(loss_mode, [0.0, 0.0])
    assert none == 0
    assert not nothing_T.any()
    if loss_mode != "geo_mean":
        _, weighted_T = objective_and_gradient(loss_mode, [0.5, 2.0])
        assert close(weighted_T, torch.tensor([0.5, 2.0]) * plain_T)


def test_a_loss_sees_the_rollout_weights_only_if_it_says_that_it_applies_them():
    seen = {}

    def spy(inputs, cfg):
        seen["weights"] = inputs.rollout_weights_T
        return TokenLoss(inputs.logprobs_T, {})

    weights_T = torch.tensor([0.5, 2.0], dtype=torch.float64)
    for applies in (False, True):
        spec = replace(
            objective_spec("gpg", "token-mean"),
            policy_loss=replace(
                POLICY_LOSSES.get("gpg"), compute=spy, applies_rollout_weights=applies
            ),
        )
        inputs, _ = one_sequence([0.05, -0.1], -1.5)
        objective, _ = actor_objective(
            inputs,
            rollout_weights_T=weights_T,
            denominators=Denominators(num_tokens=2, num_sequences=1),
            spec=spec,
        )
        factor_T = torch.ones(2) if applies else weights_T
        assert (seen["weights"] is not None) == applies
        expected = (factor_T * inputs.logprobs_T.detach()).mean()
        assert objective.item() == pytest.approx(float(expected), rel=1e-12)


def test_rollout_weights_enter_geo_mean_as_their_geometric_mean():
    clip = {}
    plain_T, _, _ = loss_and_gradient("geo_mean", clip, [0.1, -0.1], 1.0)
    for weights, factor in (([0.5, 4.5], 1.5), ([0.0, 3.0], 0.0)):
        weights_T = torch.tensor(weights, dtype=torch.float64)
        loss_T, gradient_T, _ = loss_and_gradient("geo_mean", clip, [0.1, -0.1], 1.0, weights_T)
        assert close(loss_T, factor * plain_T)
        assert close(gradient_T, [-factor] * 2)


def test_sft_is_the_negative_log_likelihood():
    assert sft(torch.tensor([-1.5, 0.0])).tolist() == [1.5, 0.0]


@pytest.mark.parametrize(
    ("loss_mode", "options", "expected"),
    [
        ("vanilla", {}, (0.2, 0.2)),
        ("vanilla", {"clip_ratio_high": 0.28}, (0.2, 0.28)),
        ("vanilla", {"clip_ratio": 0.4}, (0.4, 0.4)),
        ("geo_mean", {}, (0.4, 0.4)),
        ("geo_mean", {"clip_ratio": 0.2}, (0.2, 0.2)),
        ("geo_mean", {"clip_ratio": 0.3, "clip_ratio_low": 0.0}, (0.0, 0.3)),
        ("gspo", {}, (3e-4, 4e-4)),
        ("cispo", {}, (1.0, 4.0)),
    ],
)
def test_unset_clip_options_fall_back_to_clip_ratio_then_to_the_loss(loss_mode, options, expected):
    clip = ObjectiveConfig.of(loss_mode, **options).options
    assert (clip.low, clip.high) == expected


def test_the_dual_clip_is_3_unless_it_is_set():
    assert ObjectiveConfig.of("vanilla").options.dual == 3.0
    assert ObjectiveConfig.of("vanilla", clip_ratio_c=10.0).options.dual == 10.0


@pytest.mark.parametrize(
    ("loss_mode", "options", "message"),
    [
        ("gpg", {"clip_ratio": 0.2}, r"actor\.clip_ratio=0\.2 is not read with .*=gpg"),
        ("gpg", {"clip_ratio_high": 0.2}, r"actor\.clip_ratio_high=0\.2 is not read with .*=gpg"),
        ("sapo", {"clip_ratio_low": 0.2}, r"actor\.clip_ratio_low=0\.2 is not read with .*=sapo"),
        ("geo_mean", {"clip_ratio_c": 3.0}, r"actor\.clip_ratio_c=3\.0 is not read with .*=geo"),
        ("gspo", {"clip_ratio_c": 3.0}, r"actor\.clip_ratio_c=3\.0 is not read with .*=gspo"),
        ("vanilla", {"tau_pos": 1.3}, r"actor\.tau_pos=1\.3 is not read with .*=vanilla"),
        ("vanilla", {"clip_ratio_low": -0.1}, r"actor\.clip_ratio_low=-0\.1 must be >= 0"),
        ("vanilla", {"clip_ratio_c": 1.0}, r"actor\.clip_ratio_c=1\.0 must be > 1"),
        ("sapo", {"tau_neg": 0.0}, r"actor\.tau_neg=0\.0 must be > 0"),
        ("sapo", {"tau": 1.0}, r"actor\.tau: there is no such key\. Did you mean 'tau_"),
    ],
)
def test_options_that_would_be_ignored_or_make_no_sense_are_refused(loss_mode, options, message):
    with pytest.raises(UserError, match=message):
        ObjectiveConfig.of(loss_mode, **options)


def test_a_misspelt_loss_names_the_closest_one():
    with pytest.raises(UserError, match="Did you mean 'geo_mean'"):
        PolicyLossConfig(loss_mode="geomean")
