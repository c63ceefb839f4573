"""The actor's objective: one value and gradient per minibatch, however it is cut.

Proven for the local `Segments`, micro-batch by micro-batch; that ranks add up is proven where the
ranks are (Megatron's schedule and context parallelism).
"""

import logging
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.algorithms.aggregate import AGG_MODES
from mcore_rl.algorithms.kl import KL_KINDS
from mcore_rl.algorithms.losses import POLICY_LOSSES, PolicyLossConfig, TokenLoss
from mcore_rl.algorithms.losses.check import (
    check_cut,
    check_empty_micro_batches,
    check_loss,
    check_untrained_tokens,
    count,
    gradients,
    objective_of,
    objective_spec,
    packed,
    random_sequences,
)
from mcore_rl.algorithms.losses.sapo import SapoConfig
from mcore_rl.algorithms.objective import (
    ObjectiveConfig,
    resolve_objective,
    sft_objective,
)
from mcore_rl.errors import UserError
from mcore_rl.metrics import masked_mean, maximum, merge, to_floats
from mcore_rl.options import NoOptions

LOSSES = POLICY_LOSSES.names()
ALL_TERMS = {"kl_loss_type": "low_var_kl", "kl_loss_coef": 0.3, "entropy_coeff": 0.2}


def cut(sequences, num_parts):
    """Return `num_parts` parts, as equal as they get."""
    return [sequences[i::num_parts] for i in range(num_parts)]


@pytest.mark.parametrize("agg_mode", AGG_MODES)
@pytest.mark.parametrize("loss_mode", LOSSES)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    order=st.permutations(range(8)),
    num_parts=st.sampled_from([2, 4, 8, 11]),  # 11 leaves empty micro-batches
)
def test_every_cut_of_a_minibatch_gives_one_objective_and_gradient(
    loss_mode, agg_mode, seed, order, num_parts
):
    spec = objective_spec(loss_mode, agg_mode, **ALL_TERMS)
    sequences = random_sequences(seed)
    check_cut(sequences, cut([sequences[i] for i in order], num_parts), spec)


def test_the_objective_is_the_sum_of_its_terms_with_their_coefficients():
    sequences = random_sequences(3)
    denominators = count(sequences)
    objective, metrics = objective_of(
        sequences, denominators, objective_spec("vanilla", "token-mean", **ALL_TERMS)
    )
    inputs, beside = packed(sequences)
    entropy_T, ref_T = beside["entropy_T"], beside["ref_logprobs_T"]
    mask_T = inputs.segments.mask_T
    x_T = (ref_T - inputs.logprobs_T)[mask_T]
    kl_loss = (x_T.exp() - x_T - 1).mean()
    entropy = entropy_T[mask_T].mean()
    pg_loss, _ = objective_of(sequences, denominators, objective_spec("vanilla", "token-mean"))
    # float64, 37 terms.
    assert torch.allclose(objective, pg_loss + 0.3 * kl_loss - 0.2 * entropy, rtol=1e-12)
    numbers = to_floats(metrics)
    assert numbers["actor/loss"] == pytest.approx(objective.item(), rel=1e-12)
    assert numbers["actor/pg_loss"] == pytest.approx(pg_loss.item(), rel=1e-12)
    assert numbers["actor/kl_loss"] == pytest.approx(kl_loss.item(), rel=1e-12)
    assert numbers["actor/entropy"] == pytest.approx(entropy.item(), rel=1e-6)  # float32


@pytest.mark.parametrize("loss_mode", LOSSES)
def test_what_stands_on_untrained_tokens_changes_nothing(loss_mode):
    spec = objective_spec(loss_mode, "seq-mean-token-mean", **ALL_TERMS)
    check_untrained_tokens(random_sequences(5), spec)


@pytest.mark.parametrize("agg_mode", AGG_MODES)
@pytest.mark.parametrize("loss_mode", LOSSES)
def test_an_empty_micro_batch_gives_a_zero_that_reaches_the_graph(loss_mode, agg_mode):
    spec = objective_spec(loss_mode, agg_mode, **ALL_TERMS)
    sequences = random_sequences(1)
    check_empty_micro_batches(sequences, spec)
    _, metrics = objective_of([], count(sequences), spec)
    assert set(to_floats(metrics)) == {"actor/loss", "actor/pg_loss", "actor/kl_loss"}


def test_geo_mean_objective_is_the_mean_over_sequences_of_minus_advantage_times_ratio():
    sequences = random_sequences(11)
    objective, _ = objective_of(
        sequences, count(sequences), objective_spec("geo_mean", "seq-mean-token-mean")
    )
    losses = []
    for s in sequences[:-1]:
        d = (s.logprobs - s.old_logprobs)[s.mask]
        advantage = s.advantages[0]
        e = d.clamp(max=0.4) if advantage >= 0 else d.clamp(min=-0.4)
        weight = s.rollout_weights[s.mask].log().mean().exp()
        losses.append(-advantage * e.mean().exp() * weight)
    # float64, 7 sequences.
    assert torch.allclose(objective, torch.stack(losses).mean(), rtol=1e-12)


def test_on_policy_losses_have_the_policy_gradient():
    sequences = [
        replace(s, old_logprobs=s.logprobs.detach(), rollout_weights=torch.ones_like(s.entropy))
        for s in random_sequences(2)
    ]
    denominators = count(sequences)

    def gradients_of(loss_mode):
        spec = objective_spec(loss_mode, "seq-mean-token-mean")
        return gradients(objective_of(sequences, denominators, spec)[0], sequences)

    expected = gradients_of("gpg")
    assert any(gradient.any() for gradient in expected)
    for loss_mode in LOSSES:
        for actual, want in zip(gradients_of(loss_mode), expected, strict=True):
            # float64, a mean of at most 9 terms.
            assert torch.allclose(actual, want, rtol=1e-12, atol=1e-15)


def test_sft_objective_is_the_mean_negative_log_likelihood_over_the_minibatch():
    sequences = random_sequences(4)
    denominators = count(sequences)
    results = []
    for part in cut(sequences, 4):
        inputs, _ = packed(part)
        results.append(sft_objective(inputs.logprobs_T, inputs.segments, denominators))
    expected = -torch.cat([s.logprobs[s.mask] for s in sequences]).mean()
    total = torch.stack([objective for objective, _ in results]).sum()
    # float64, 37 terms.
    assert torch.allclose(total, expected, rtol=1e-12)
    merged = to_floats(merge(metrics for _, metrics in results))
    assert merged == {"sft/loss": pytest.approx(expected.item(), rel=1e-12)}
    (gradient,) = torch.autograd.grad(total, sequences[0].logprobs)
    assert torch.allclose(gradient, -sequences[0].mask.double() / denominators.num_tokens)


def test_sft_objective_does_not_read_untrained_tokens():
    (sequence,) = random_sequences(4, lengths=(6,))
    mask = torch.tensor([True, False, True, False, False, True])
    logprobs_T = torch.where(mask, sequence.logprobs.detach(), -math.inf).requires_grad_()
    trained = replace(sequence, logprobs=logprobs_T, mask=mask)
    inputs, _ = packed([trained])
    objective, _ = sft_objective(inputs.logprobs_T, inputs.segments, count([trained]))
    assert torch.allclose(objective, -logprobs_T[mask].mean(), rtol=1e-12)
    (gradient_T,) = torch.autograd.grad(objective, logprobs_T)
    assert torch.equal(gradient_T, -mask.double() / 3)


def test_only_what_the_objective_uses_is_asked_for():
    plain = resolve_objective(ObjectiveConfig(), 100)
    assert plain.needs_old_logprobs
    assert plain.kl_loss_type is None
    assert not plain.needs_entropy
    rich = resolve_objective(
        ObjectiveConfig(
            policy_loss=PolicyLossConfig(loss_mode="gpg"), use_kl_loss=True, entropy_coeff=0.01
        ),
        100,
    )
    assert not rich.needs_old_logprobs
    assert rich.needs_entropy
    assert (rich.kl_loss_type, rich.kl_loss_coef) == ("low_var_kl", 0.001)


def test_the_scale_factor_defaults_to_the_response_length_where_it_is_read():
    cfg = ObjectiveConfig(loss_agg_mode="seq-mean-token-sum-norm")
    assert resolve_objective(cfg, 100).loss_scale_factor == 100.0
    cfg = ObjectiveConfig(loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=7.0)
    assert resolve_objective(cfg, 100).loss_scale_factor == 7.0
    assert resolve_objective(ObjectiveConfig(), 100).loss_scale_factor is None
    with pytest.raises(UserError, match=r"actor\.loss_scale_factor=7\.0 is not read"):
        resolve_objective(ObjectiveConfig(loss_scale_factor=7.0), 100)


def test_options_of_a_loss_reach_it_and_are_refused_by_the_others():
    cfg = ObjectiveConfig.of("sapo", tau_pos=1.3)
    assert resolve_objective(cfg, 100).options == SapoConfig(tau_pos=1.3, tau_neg=1.05)
    with pytest.raises(UserError, match=r"actor\.tau_pos=1\.3 is not read with .*=vanilla"):
        ObjectiveConfig.of("vanilla", tau_pos=1.3)


@pytest.mark.parametrize("loss_mode", ["geo_mean", "gspo", "sapo"])
def test_an_aggregation_that_does_not_apply_warns_once_and_is_not_used(loss_mode, caplog):
    policy_loss = PolicyLossConfig(loss_mode=loss_mode)
    with caplog.at_level(logging.WARNING):
        spec = resolve_objective(ObjectiveConfig(policy_loss=policy_loss), 100)
    assert spec.agg_mode == "seq-mean-token-mean"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        cfg = ObjectiveConfig(policy_loss=policy_loss, loss_agg_mode="token-sum")
        assert resolve_objective(cfg, 100).agg_mode == "seq-mean-token-mean"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "token-sum does not apply" in caplog.text


def test_a_clip_ratio_that_both_sides_override_warns_and_is_not_used(caplog):
    with caplog.at_level(logging.WARNING):
        for options in ({"clip_ratio": 0.1}, {"clip_ratio": 0.1, "clip_ratio_low": 0.3}):
            resolve_objective(ObjectiveConfig.of("vanilla", **options), 100)
        assert not caplog.records
        bounds = {"clip_ratio": 0.1, "clip_ratio_low": 0.3, "clip_ratio_high": 0.4}
        clip = resolve_objective(ObjectiveConfig.of("vanilla", **bounds), 100).options
    assert (clip.low, clip.high) == (0.3, 0.4)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "actor.clip_ratio=0.1 does not apply" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_agg_mode": "mean"}, r"actor\.loss_agg_mode='mean' is not one of"),
        ({"kl_loss_type": "k4"}, r"actor\.kl_loss_type='k4' is not one of"),
        ({"kl_loss_coef": -1.0}, r"actor\.kl_loss_coef=-1\.0 must be >= 0"),
        ({"loss_scale_factor": 0.0}, r"actor\.loss_scale_factor=0\.0 must be > 0"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ObjectiveConfig(**options)


@pytest.mark.parametrize("kind", KL_KINDS)
def test_every_kl_kind_can_be_a_loss(kind):
    cfg = ObjectiveConfig(use_kl_loss=True, kl_loss_type=kind, kl_loss_coef=1.0)
    sequences = random_sequences(6)
    with_kl, metrics = objective_of(sequences, count(sequences), resolve_objective(cfg, 100))
    without, _ = objective_of(
        sequences, count(sequences), resolve_objective(ObjectiveConfig(), 100)
    )
    expected = to_floats(metrics)["actor/kl_loss"]
    assert (with_kl - without).item() == pytest.approx(expected, abs=1e-12)
    assert expected != 0


def averaged_over_the_micro_batch(inputs, cfg):
    num_tokens = inputs.segments.mask_T.sum().clamp(min=1)
    return TokenLoss(-inputs.advantages_T * inputs.logprobs_T / num_tokens, {})


def of_the_row_s_mean_advantage(inputs, cfg):
    advantage = inputs.advantages_T.sum() / inputs.segments.num_tokens_S.sum().clamp(min=1)
    return TokenLoss(-advantage * inputs.logprobs_T, {})


def without_a_graph(inputs, cfg):
    return TokenLoss(-inputs.advantages_T * inputs.logprobs_T.detach(), {})


def with_a_metric_of_every_token(inputs, cfg):
    everywhere_T = torch.ones_like(inputs.segments.mask_T)
    value = masked_mean(inputs.logprobs_T, everywhere_T)
    return TokenLoss(-inputs.advantages_T * inputs.logprobs_T, {"actor/x": maximum(value.value)})


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (averaged_over_the_micro_batch, r"the loss is .* in 2 micro-batches \(token-mean\)"),
        (of_the_row_s_mean_advantage, r"the loss is .* in 2 micro-batches \(token-mean\)"),
        (without_a_graph, r"does not require grad"),
        (with_a_metric_of_every_token, r"actor/x is .* in 2 micro-batches \(token-mean\)"),
    ],
)
def test_the_check_of_a_loss_finds_one_that_depends_on_micro_batches(monkeypatch, compute, message):
    monkeypatch.setattr(POLICY_LOSSES, "_entries", dict(POLICY_LOSSES._entries))
    POLICY_LOSSES.register("faulty", config=NoOptions, needs_old_logprobs=False)(compute)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check_loss("faulty")


@pytest.mark.parametrize("loss_mode", LOSSES)
def test_every_loss_of_the_package_passes_the_check_for_plugins(loss_mode):
    check_loss(loss_mode, num_minibatches=1)
