"""Grouped products: those of each group, and no copy of the weights that waits for a backward."""

import pytest
import torch
import torch.nn.functional as F

from mcore_rl.megatron.experts import grouped_product

COUNTS = (3, 0, 5, 1)


def inputs(dtype=torch.float32, trained=True):
    """Return rows, one weight per group and the end of each group."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(COUNTS), 16, generator=generator).to(dtype).requires_grad_()
    weights = [
        torch.randn(8, 16, generator=generator).to(dtype).requires_grad_(trained) for _ in COUNTS
    ]
    return rows, weights, torch.tensor(COUNTS).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_those_of_a_product_per_group(dtype, rtol):
    rows, weights, ends = inputs(dtype)
    factor = torch.randn(sum(COUNTS), 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    parts = zip(rows.split(COUNTS), weights, strict=True)
    expected = torch.cat([F.linear(part, weight) for part, weight in parts])
    of_expected = torch.autograd.grad(expected, [rows, *weights], factor)
    found = grouped_product(rows, weights, ends)
    of_found = torch.autograd.grad(found, [rows, *weights], factor)
    # Sums of 16 products, rounded to the type; of 5 in the weights' gradients.
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    for ours, theirs in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    assert not of_found[1 + COUNTS.index(0)].any()  # no rows, no gradient


def test_weights_that_do_not_train_get_no_gradient():
    rows, weights, ends = inputs(trained=False)
    grouped_product(rows, weights, ends).sum().backward()
    assert rows.grad is not None
    assert all(weight.grad is None for weight in weights)


def test_no_copy_of_the_weights_waits_for_the_backward_pass():
    rows, weights, ends = inputs()
    waiting = []

    def keep(tensor):
        waiting.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        grouped_product(rows, weights, ends)
    given = {x.untyped_storage().data_ptr() for x in (rows, ends, *weights)}
    assert set(waiting) == given
