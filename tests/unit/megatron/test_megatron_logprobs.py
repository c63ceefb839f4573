"""Blocked, vocabulary-parallel log-probabilities against the plain formula in float64.

Shapes: T tokens, H hidden, V vocabulary without padding rows.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_rl.megatron.logprobs import (
    KEPT_BLOCKS,
    logprobs_reference,
    vocab_parallel_logprobs,
)
from tests.unit.megatron import logprob_cases

HIDDEN = 12


def random_inputs(seed, num_tokens, vocab_size, num_pad_rows=0, dtype=torch.float32):
    """Return (hidden [T, H], weight [V + pad, H], labels [T], factors of the loss [T, 2]).

    Logits have a spread of 2; padding rows hold numbers that would show in any result.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(num_tokens, HIDDEN, generator=generator)
    weight = torch.randn(vocab_size + num_pad_rows, HIDDEN, generator=generator) * 2 * HIDDEN**-0.5
    weight[vocab_size:] = 100.0
    labels_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels_T[:2] = torch.tensor([0, vocab_size - 1])[:num_tokens]
    factors_T2 = torch.randn(num_tokens, 2, generator=generator)
    return hidden_TH.to(dtype), weight.to(dtype), labels_T, factors_T2


def with_gradients(
    function, hidden_TH, weight_VH, labels_T, factors_T2, with_entropy=True
) -> tuple[Any, ...]:
    """Return logprobs, entropy (or None) and the gradients of hidden states and weight."""
    hidden, weight = hidden_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    logprobs_T, entropy_T = function(hidden, weight, labels_T)
    loss = factors_T2[:, 0].to(logprobs_T) @ logprobs_T
    if with_entropy:
        loss = loss + factors_T2[:, 1].to(entropy_T) @ entropy_T
    loss.backward()
    return logprobs_T.detach(), entropy_T, hidden.grad, weight.grad


def exact(hidden_TH, weight_VH, labels_T, factors_T2, temperature, with_entropy=True):
    """Return the same by autograd through the plain formula in float64."""

    def formula(hidden, weight, labels):
        logprobs_TV = (hidden @ weight.t() / temperature).log_softmax(-1)
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
        return logprobs_TV.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy_T

    inputs = hidden_TH.double(), weight_VH.double(), labels_T, factors_T2
    return with_gradients(formula, *inputs, with_entropy=with_entropy)


def assert_all_close(found, expected, atol):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double().detach(), theirs.detach(), rtol=0, atol=atol)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_tokens=st.integers(1, 23),
    vocab_size=st.integers(2, 40),
    num_pad_rows=st.integers(0, 5),
    temperature=st.sampled_from([1.0, 0.6, 1.7]),
    block_logits=st.integers(1, 400),
)
def test_values_and_gradients_are_those_of_the_formula(
    seed, num_tokens, vocab_size, num_pad_rows, temperature, block_logits
):
    inputs = random_inputs(seed, num_tokens, vocab_size, num_pad_rows)

    def ours(hidden, weight, labels):
        return vocab_parallel_logprobs(
            hidden,
            weight,
            labels,
            temperature=temperature,
            vocab_size=vocab_size,
            group=None,
            with_entropy=True,
            block_logits=block_logits,
        )

    *values, hidden_grad, weight_grad = with_gradients(ours, *inputs)
    assert all(value.dtype == torch.float32 for value in values)
    assert torch.equal(weight_grad[vocab_size:], torch.zeros(num_pad_rows, HIDDEN))
    hidden_TH, weight_VH, labels_T, factors_T2 = inputs
    expected = exact(hidden_TH, weight_VH[:vocab_size], labels_T, factors_T2, temperature)
    # float32: a logit of size 20 rounds by 2e-6, which the entropy's gradient multiplies by a log
    # probability of that size; observed 3e-5 (gradients) and 5e-6 (values) in 3000 draws.
    assert_all_close([*values, hidden_grad, weight_grad[:vocab_size]], expected, atol=1e-4)


def test_the_reference_of_the_package_is_the_formula():
    inputs = random_inputs(0, 17, 31)
    found = with_gradients(lambda *args: logprobs_reference(*args, temperature=1.3), *inputs)
    # float32; observed 6e-7.
    assert_all_close(found, exact(*inputs, 1.3), atol=1e-5)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_loss_without_entropy_needs_none(with_entropy):
    """With and without computing it, the gradient of the log-probabilities alone is the same."""
    inputs = random_inputs(1, 13, 29)
    found = with_gradients(
        lambda *args: vocab_parallel_logprobs(
            *args,
            temperature=0.8,
            vocab_size=29,
            group=None,
            with_entropy=with_entropy,
            block_logits=60,
        ),
        *inputs,
        with_entropy=False,
    )
    assert (found[1] is not None) == with_entropy
    expected = exact(*inputs, 0.8, with_entropy=False)
    # float32; observed 7e-7.
    assert_all_close([found[0], *found[2:]], [expected[0], *expected[2:]], atol=1e-5)


def test_extreme_logits_give_finite_values_and_gradients():
    hidden_TH, weight_VH, labels_T, factors_T2 = random_inputs(2, 6, 20)
    inputs = 200 * hidden_TH, weight_VH, labels_T, factors_T2
    found = with_gradients(
        lambda *args: vocab_parallel_logprobs(
            *args, temperature=1.0, vocab_size=20, group=None, with_entropy=True, block_logits=60
        ),
        *inputs,
    )
    assert found[0].min() < -500
    assert all(torch.isfinite(tensor).all() for tensor in found)
    # float32 logits of size 1000 round by 6e-5, gradients are products with hidden states of size
    # 500; observed 9e-5 and 2e-3.
    expected = exact(*inputs, 1.0)
    assert_all_close(found[:2], expected[:2], atol=1e-3)
    assert_all_close(found[2:], expected[2:], atol=1e-1)


def test_bfloat16_inputs_are_reduced_in_float32():
    """Differs from the formula on the same rounded inputs by the rounding of the logits alone."""
    inputs = random_inputs(3, 40, 37, dtype=torch.bfloat16)
    found = with_gradients(
        lambda *args: vocab_parallel_logprobs(
            *args, temperature=1.0, vocab_size=37, group=None, with_entropy=True, block_logits=400
        ),
        *inputs,
    )
    assert found[0].dtype == found[1].dtype == torch.float32
    assert found[2].dtype == found[3].dtype == torch.bfloat16
    expected = exact(*inputs, 1.0)
    # bfloat16 logits of size up to 8 round by 2**-6 = 0.016; observed 0.011.
    assert_all_close(found[:2], expected[:2], atol=0.05)
    # relative rounding 2**-8 of gradients of size up to 10; observed 0.047.
    assert_all_close(found[2:], expected[2:], atol=0.2)


class Cost(TorchDispatchMode):
    """Records the size of the largest float32 tensor that any operation returns, and the
    multiply-adds of all matrix products."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.multiply_adds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out):
            self.multiply_adds += args[0].numel() * args[1].shape[1]
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_tensor_is_larger_than_a_block_of_logits(with_entropy):
    """Forward and backward, at 16 blocks; inputs and their gradients are smaller than a block."""
    num_tokens, vocab_size, block_rows = 256, 208, 13
    block_logits = num_tokens * block_rows
    inputs = random_inputs(4, num_tokens, vocab_size)
    assert max(num_tokens, vocab_size) * HIDDEN < block_logits

    def run(function):
        with Cost() as cost:
            with_gradients(function, *inputs, with_entropy=with_entropy)
        return cost

    blocked = run(
        lambda *args: vocab_parallel_logprobs(
            *args,
            temperature=1.5,
            vocab_size=vocab_size,
            group=None,
            with_entropy=with_entropy,
            block_logits=block_logits,
        )
    )
    assert blocked.largest == block_logits
    whole = run(lambda *args: logprobs_reference(*args, temperature=1.5))
    assert whole.largest == num_tokens * vocab_size
    # One product forward and two backward, which computes all blocks but the kept ones again.
    products = 16 + 2 * 16 + (16 - KEPT_BLOCKS)
    assert blocked.multiply_adds == products * block_logits * HIDDEN


@pytest.mark.parametrize("with_entropy", [False, True])
def test_tokens_without_a_gradient_cost_nothing_backward(with_entropy):
    """The same gradients as the formula's; a token counts if the loss reads its log-probability or
    its entropy."""
    hidden_TH, weight_VH, labels_T, factors_T2 = random_inputs(6, 40, 50)
    factors_T2[:30, 0] = 0.0
    factors_T2[4:, 1] = 0.0
    num_counted = 14 if with_entropy else 10
    inputs = hidden_TH, weight_VH, labels_T, factors_T2
    with Cost() as cost:
        found = with_gradients(
            lambda *args: vocab_parallel_logprobs(
                *args,
                temperature=1.3,
                vocab_size=50,
                group=None,
                with_entropy=with_entropy,
                block_logits=40 * 5,
            ),
            *inputs,
            with_entropy=with_entropy,
        )
    # Ten blocks of 5 rows.
    rows = 10 * 40 + (2 * 10 + (10 - KEPT_BLOCKS)) * num_counted
    assert cost.multiply_adds == rows * 5 * HIDDEN
    assert torch.equal(found[2][10:30], torch.zeros(20, HIDDEN))
    expected = exact(*inputs, 1.3, with_entropy=with_entropy)
    # float32; observed 1e-6.
    assert_all_close(found[2:], expected[2:], atol=1e-5)


def test_a_loss_that_reads_nothing_has_gradient_zero():
    hidden_TH, weight_VH, labels_T, _ = random_inputs(7, 5, 9)
    found = with_gradients(
        lambda *args: vocab_parallel_logprobs(
            *args, temperature=1.0, vocab_size=9, group=None, with_entropy=True
        ),
        *(hidden_TH, weight_VH, labels_T, torch.zeros(5, 2)),
    )
    assert torch.equal(found[2], torch.zeros_like(hidden_TH))
    assert torch.equal(found[3], torch.zeros_like(weight_VH))


@pytest.mark.parametrize(
    ("vocab_size", "num_pad_rows"),
    [(38, 0), (37, 1), (5, 5)],  # the last leaves rank 1 nothing but padding
)
def test_a_vocabulary_cut_over_two_ranks_gives_the_same(processes, vocab_size, num_pad_rows):
    """Values and weight gradients as of one process; hidden gradients after the sum over ranks
    that the caller owes."""
    inputs = random_inputs(5, 19, vocab_size, num_pad_rows)
    by_rank = processes.run(logprob_cases.sharded_logprobs, 2, *inputs, vocab_size)
    hidden_TH, weight_VH, labels_T, factors_T2 = inputs
    expected = exact(hidden_TH, weight_VH[:vocab_size], labels_T, factors_T2, 1.4)
    weight_grad = torch.cat([weight for *_, weight in by_rank])
    assert torch.equal(weight_grad[vocab_size:], torch.zeros(num_pad_rows, HIDDEN))
    for logprobs_T, entropy_T, _, _ in by_rank:
        found = logprobs_T, entropy_T, by_rank[0][2] + by_rank[1][2], weight_grad[:vocab_size]
        # float32; observed 8e-7.
        assert_all_close(found, expected, atol=1e-5)


def test_a_second_backward_pass_is_refused():
    """The first writes its gradient over the logits that waited for it."""
    hidden, weight = torch.randn(5, 8).requires_grad_(), torch.randn(16, 8)
    logprobs_T, _ = vocab_parallel_logprobs(
        hidden,
        weight,
        torch.arange(5),
        temperature=1.0,
        vocab_size=16,
        group=None,
        with_entropy=False,
    )
    logprobs_T.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs_T.sum().backward()
