"""Policy losses: which side is clipped, what passes gradient, rollout weights, clip options."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.algorithms.losses import (
    POLICY_LOSSES,
    ClipBounds,
    PolicyLossConfig,
    PolicyLossInputs,
    resolve_clip,
)
from mcore_rl.algorithms.losses.sft import sft
from mcore_rl.algorithms.objective import ObjectiveConfig
from mcore_rl.algorithms.segments import Segments
from mcore_rl.errors import UserError
from mcore_rl.metrics import to_floats


def one_sequence(log_ratios, advantage, rollout_is_weights=None):
    """Return (inputs, logprobs_T leaf) of one sequence with these log-ratios, all trained."""
    n = len(log_ratios)
    old_T = torch.linspace(-3, -1, n, dtype=torch.float64)
    logprobs_T = (old_T + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_()
    inputs = PolicyLossInputs(
        logprobs_T=logprobs_T,
        old_logprobs_T=old_T,
        advantages_T=torch.full((n,), advantage, dtype=torch.float64),
        rollout_is_weights_T=rollout_is_weights,
        segments=Segments(
            sequence_T=torch.zeros(n, dtype=torch.int64),
            mask_T=torch.ones(n, dtype=torch.bool),
            num_tokens_S=torch.tensor([float(n)], dtype=torch.float64),
        ),
    )
    return inputs, logprobs_T


def loss_and_gradient(loss_mode, clip, *args, options=None):
    inputs, logprobs_T = one_sequence(*args)
    loss = POLICY_LOSSES.get(loss_mode)
    options = options or {name: getattr(ObjectiveConfig(), name) for name in loss.reads}
    token_loss = loss.compute(inputs, clip, **options)
    (gradient_T,) = torch.autograd.grad(token_loss.loss_T.sum(), logprobs_T)
    return token_loss.loss_T.detach(), gradient_T, to_floats(token_loss.metrics)


def close(actual, expected):
    # float64, closed forms of a few operations.
    return torch.allclose(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_vanilla_clips_only_the_side_that_the_advantage_favours():
    clip = ClipBounds(low=0.2, high=0.3, dual=3.0)
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
    clip = ClipBounds(low=0.2, high=0.2, dual=3.0)
    loss_T, gradient_T, metrics = loss_and_gradient("vanilla", clip, [math.log(5.0), 0.0], -2.0)
    assert close(loss_T, [2 * 3.0, 2.0])
    assert close(gradient_T, [0.0, 2.0])
    assert metrics["actor/clip_frac_lower"] == pytest.approx(0.5)
    loss_T, _, metrics = loss_and_gradient("vanilla", clip, [math.log(5.0), 0.0], 2.0)
    assert close(loss_T, [-2 * 1.2, -2.0])
    assert metrics["actor/clip_frac_lower"] == 0


def test_vanilla_cuts_absurd_log_ratios_before_they_overflow():
    clip = ClipBounds(low=0.2, high=0.2, dual=1e9)
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
        "geo_mean", ClipBounds(low=low, high=high), log_ratios, advantage
    )
    # The ratio is formed as the loss forms it, so that a token at a bound falls on the same side.
    inputs, _ = one_sequence(log_ratios, advantage)
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
    clip = ClipBounds(low=0.4, high=0.4)
    loss_T, gradient_T, metrics = loss_and_gradient("geo_mean", clip, [1.0, -0.2], 1.0)
    ratio = math.exp((0.4 - 0.2) / 2)
    assert close(loss_T, [-ratio, -ratio])
    assert close(gradient_T, [0.0, -ratio])
    assert metrics["actor/clip_frac"] == pytest.approx(0.5)
    assert metrics["actor/clip_frac_lower"] == 0


def test_geo_mean_cuts_only_low_ratios_when_the_advantage_is_negative():
    clip = ClipBounds(low=0.3, high=0.4)
    _, gradient_T, metrics = loss_and_gradient("geo_mean", clip, [1.0, -1.0], -1.0)
    assert close(gradient_T, [math.exp((1.0 - 0.3) / 2), 0.0])
    assert metrics["actor/clip_frac"] == metrics["actor/clip_frac_lower"] == pytest.approx(0.5)


def test_geo_mean_bounds_of_0_4_are_ratios_of_0_670_and_1_492():
    clip = resolve_clip("geo_mean", None, None, None, None)
    loss_T, _, _ = loss_and_gradient("geo_mean", clip, [5.0, 5.0], 1.0)
    assert -loss_T[0].item() == pytest.approx(1.492, abs=5e-4)
    loss_T, _, _ = loss_and_gradient("geo_mean", clip, [-5.0, -5.0], -1.0)
    assert loss_T[0].item() == pytest.approx(0.670, abs=5e-4)


def test_gspo_gives_each_token_the_ratio_of_the_sequence_and_its_own_gradient():
    clip = ClipBounds(low=0.5, high=0.5)
    loss_T, gradient_T, metrics = loss_and_gradient("gspo", clip, [0.3, -0.1], 2.0)
    ratio = math.exp(0.1)
    assert close(loss_T, [-2 * ratio] * 2)
    assert close(gradient_T, [-2 * ratio] * 2)
    assert metrics["actor/seq_ratio/max"] == pytest.approx(ratio, rel=1e-6)


def test_gspo_clips_whole_sequences_on_one_side():
    clip = ClipBounds(low=0.05, high=0.05)
    loss_T, gradient_T, metrics = loss_and_gradient("gspo", clip, [0.3, -0.1], 2.0)
    assert close(loss_T, [-2 * 1.05] * 2)
    assert gradient_T.tolist() == [0.0, 0.0]
    assert metrics["actor/clip_frac"] == 1
    _, gradient_T, metrics = loss_and_gradient("gspo", clip, [0.3, -0.1], -2.0)
    assert close(gradient_T, [2 * math.exp(0.1)] * 2)
    assert metrics["actor/clip_frac"] == 0


def test_gspo_cuts_absurd_sequence_ratios_before_they_overflow():
    clip = ClipBounds(low=0.05, high=0.05)
    loss_T, gradient_T, _ = loss_and_gradient("gspo", clip, [800.0, 900.0], -1.0)
    assert close(loss_T, [math.exp(10.0)] * 2)
    assert gradient_T.tolist() == [0.0, 0.0]


def test_gpg_is_the_plain_policy_gradient_without_old_logprobs():
    inputs = PolicyLossInputs(
        logprobs_T=torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True),
        advantages_T=torch.tensor([3.0, -1.0], dtype=torch.float64),
        segments=one_sequence([0.0, 0.0], 1.0)[0].segments,
    )
    loss_T = POLICY_LOSSES.get("gpg").compute(inputs, ClipBounds()).loss_T
    assert loss_T.tolist() == [3.0, -2.0]
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), inputs.logprobs_T)
    assert gradient_T.tolist() == [-3.0, 1.0]


def test_cispo_bounds_the_weight_and_lets_every_token_train():
    clip = ClipBounds(low=0.2, high=0.5)
    ratios = [3.0, 1.1, 0.1]
    loss_T, gradient_T, metrics = loss_and_gradient(
        "cispo", clip, [math.log(r) for r in ratios], -2.0
    )
    _, logprobs_T = one_sequence([math.log(r) for r in ratios], -2.0)
    assert close(gradient_T, [2 * 1.5, 2 * 1.1, 2 * 0.8])
    assert close(loss_T, gradient_T * logprobs_T.detach())
    assert metrics["actor/clip_frac"] == pytest.approx(2 / 3)


def test_cispo_by_default_leaves_small_weights_as_they_are():
    clip = resolve_clip("cispo", None, None, None, None)
    _, gradient_T, _ = loss_and_gradient("cispo", clip, [-5.0, 5.0], 1.0)
    assert close(gradient_T, [-math.exp(-5.0), -5.0])


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.3), (-2.0, 3.0)])
def test_sapo_gates_the_ratio_with_the_temperature_of_the_sign(advantage, tau):
    log_ratios = [0.0, 0.7, -0.9]
    loss_T, gradient_T, _ = loss_and_gradient(
        "sapo", ClipBounds(), log_ratios, advantage, options={"tau_pos": 1.3, "tau_neg": 3.0}
    )
    gates = [1 / (1 + math.exp(-tau * (math.exp(d) - 1))) for d in log_ratios]
    assert close(loss_T, [-advantage * gate * 4 / tau for gate in gates])
    # d loss / d logprob = -A * 4 gate (1 - gate) * r; 4 gate (1 - gate) is 1 at r = 1.
    slopes = [4 * g * (1 - g) * math.exp(d) for g, d in zip(gates, log_ratios, strict=True)]
    assert close(gradient_T, [-advantage * slope for slope in slopes])
    assert gradient_T[0].item() == pytest.approx(-advantage, rel=1e-12)


@pytest.mark.parametrize("loss_mode", ["cispo", "sapo"])
def test_absurd_log_ratios_do_not_overflow(loss_mode):
    clip = resolve_clip(loss_mode, None, None, None, None)
    loss_T, gradient_T, _ = loss_and_gradient(loss_mode, clip, [800.0, -800.0], -1.0)
    assert loss_T.isfinite().all()
    assert gradient_T.isfinite().all()


@pytest.mark.parametrize("loss_mode", ["vanilla", "gspo", "gpg", "cispo", "sapo"])
def test_rollout_weights_multiply_token_losses(loss_mode):
    clip = resolve_clip(loss_mode, None, None, None, None)
    weights_T = torch.tensor([0.5, 2.0], dtype=torch.float64)
    plain_T, plain_gradient_T, _ = loss_and_gradient(loss_mode, clip, [0.05, -0.1], -1.5)
    loss_T, gradient_T, _ = loss_and_gradient(loss_mode, clip, [0.05, -0.1], -1.5, weights_T)
    assert close(loss_T, weights_T * plain_T)
    assert close(gradient_T, weights_T * plain_gradient_T)


def test_rollout_weights_enter_geo_mean_as_their_geometric_mean():
    clip = resolve_clip("geo_mean", None, None, None, None)
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
        ("vanilla", {}, ClipBounds(low=0.2, high=0.2, dual=3.0)),
        ("vanilla", {"clip_ratio_high": 0.28}, ClipBounds(low=0.2, high=0.28, dual=3.0)),
        ("vanilla", {"clip_ratio": 0.4}, ClipBounds(low=0.4, high=0.4, dual=3.0)),
        ("vanilla", {"clip_ratio_c": 10.0}, ClipBounds(low=0.2, high=0.2, dual=10.0)),
        ("geo_mean", {}, ClipBounds(low=0.4, high=0.4)),
        ("geo_mean", {"clip_ratio": 0.2}, ClipBounds(low=0.2, high=0.2)),
        (
            "geo_mean",
            {"clip_ratio": 0.3, "clip_ratio_low": 0.0},
            ClipBounds(low=0.0, high=0.3),
        ),
        ("gspo", {}, ClipBounds(low=3e-4, high=4e-4)),
        ("gpg", {}, ClipBounds(low=math.inf, high=math.inf)),
        ("cispo", {}, ClipBounds(low=1.0, high=4.0)),
        ("sapo", {}, ClipBounds(low=math.inf, high=math.inf)),
    ],
)
def test_unset_clip_options_fall_back_to_clip_ratio_then_to_the_loss(loss_mode, options, expected):
    names = ("clip_ratio", "clip_ratio_low", "clip_ratio_high", "clip_ratio_c")
    assert resolve_clip(loss_mode, *(options.get(name) for name in names)) == expected


@pytest.mark.parametrize(
    ("loss_mode", "values", "message"),
    [
        ("gpg", (0.2, None, None, None), r"actor\.clip_ratio=0\.2 is not read by .*gpg"),
        ("gpg", (None, None, 0.2, None), r"actor\.clip_ratio_high=0\.2 is not read by .*gpg"),
        (
            "geo_mean",
            (None, None, None, 3.0),
            r"actor\.clip_ratio_c=3\.0 is not read by .*geo_mean",
        ),
        ("gspo", (None, None, None, 3.0), r"actor\.clip_ratio_c=3\.0 is not read by .*gspo"),
        ("vanilla", (None, -0.1, None, None), r"actor\.clip_ratio_low=-0\.1 must be >= 0"),
        ("vanilla", (None, None, None, 1.0), r"actor\.clip_ratio_c=1\.0 must be > 1"),
    ],
)
def test_clip_options_that_would_be_ignored_or_make_no_sense_are_refused(
    loss_mode, values, message
):
    with pytest.raises(UserError, match=message):
        resolve_clip(loss_mode, *values)


def test_a_misspelt_loss_names_the_closest_one():
    with pytest.raises(UserError, match="Did you mean 'geo_mean'"):
        PolicyLossConfig(loss_mode="geomean")
