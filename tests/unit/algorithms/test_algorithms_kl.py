"""KL estimators: closed forms of values and gradients, unbiasedness, the `+` suffix."""

import pytest
import torch

from mcore_rl.algorithms.kl import KL_KINDS, KL_VALUES, kl_penalty

X = torch.tensor([-1.5, -0.2, 0.0, 0.4, 2.0], dtype=torch.float64)
"""ref_logprob - logprob."""

CLOSED_FORMS = {
    "k1": (-X, torch.ones_like(X)),
    "abs": (X.abs(), -X.sign()),
    "k2": (X.square() / 2, -X),
    "k3": (X.exp() - X - 1, 1 - X.exp()),
}
"""Value and derivative by logprob."""

ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}


def value_and_gradient(kind, x_T):
    logprobs_T = torch.full_like(x_T, -1.0).requires_grad_()
    kl_T = kl_penalty(logprobs_T, logprobs_T.detach() + x_T, kind)
    (gradient_T,) = torch.autograd.grad(kl_T.sum(), logprobs_T)
    return kl_T.detach(), gradient_T


@pytest.mark.parametrize("kind", KL_VALUES)
def test_values_and_gradients_are_the_closed_forms(kind: str):
    value_T, gradient_T = value_and_gradient(kind, X)
    expected_value_T, expected_gradient_T = CLOSED_FORMS[ALIASES.get(kind, kind)]
    # float64; x itself is a difference of numbers of order 1.
    assert torch.allclose(value_T, expected_value_T, rtol=0, atol=1e-14)
    assert torch.allclose(gradient_T, expected_gradient_T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KL_VALUES)
def test_a_plus_keeps_the_value_and_takes_the_gradient_of_k2(kind):
    value_T, gradient_T = value_and_gradient(f"{kind}+", X)
    assert torch.equal(value_T, value_and_gradient(kind, X)[0])
    assert torch.equal(gradient_T, value_and_gradient("k2", X)[1])


def test_k3_is_cut_where_it_would_overflow():
    value_T, gradient_T = value_and_gradient("k3", torch.tensor([800.0, -800.0]).double())
    assert value_T.tolist() == [10.0, 10.0]
    assert gradient_T.tolist() == [0.0, 0.0]


def test_k3_of_models_that_nearly_agree_is_small_and_never_negative_in_float32():
    x_T = torch.logspace(-8, 0, 2001)
    x_T = torch.cat([x_T, -x_T])
    value_T = kl_penalty(torch.zeros_like(x_T), x_T, "k3")
    expm1_T = x_T.double().expm1()
    error_T = (value_T - (expm1_T - x_T.double())).abs()
    assert (value_T >= 0).all()
    # A last digit of exp(x) - 1, as torch's vector library promises, and half of one of the
    # difference; observed 0.75 of it, without expm1 6e6 times as much.
    assert (error_T <= 2**-23 * expm1_T.abs() + 2**-24 * value_T).all()


def test_k1_and_k3_are_unbiased_and_k2_has_the_gradient_of_the_kl():
    """Expectations over all tokens of a small vocabulary, exactly, instead of by sampling."""
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    # Close enough to the policy that no cut of k3 is reached.
    ref_V = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    logprobs_V = logits_V.log_softmax(0)
    true_kl = (logprobs_V.exp() * (logprobs_V - ref_V)).sum()
    p_V = logprobs_V.exp().detach()
    for kind in ("k1", "k3"):
        expected = (p_V * kl_penalty(logprobs_V, ref_V, kind)).sum()
        assert torch.allclose(expected, true_kl, rtol=1e-12)  # float64, 6 terms
    (true_gradient,) = torch.autograd.grad(true_kl, logits_V, retain_graph=True)
    for kind in ("k2", "k1+", "k3+"):
        expected = (p_V * kl_penalty(logprobs_V, ref_V, kind)).sum()
        (gradient,) = torch.autograd.grad(expected, logits_V, retain_graph=True)
        assert torch.allclose(gradient, true_gradient, rtol=0, atol=1e-14)


def test_all_public_names_are_offered():
    names = {"kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"}
    assert set(KL_VALUES) == names
    assert set(KL_KINDS) == names | {f"{name}+" for name in names}
