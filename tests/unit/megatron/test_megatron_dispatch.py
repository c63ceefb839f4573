"""Rows of experts: no copy of what is in order, Megatron's numbers otherwise."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import sort_chunks_by_idxs

from mcore_rl.megatron.dispatch import sorted_chunks

SIZES = torch.tensor([2, 0, 3])
ROWS = torch.arange(10.0).view(5, 2)
PROBS = torch.arange(5.0)


def test_rows_that_are_in_order_are_not_copied():
    rows, probs = sorted_chunks(ROWS, SIZES, torch.arange(3), PROBS)
    assert rows is ROWS
    assert probs is PROBS


@pytest.mark.parametrize("probs", [None, PROBS])
def test_other_orders_are_megatrons(probs):
    order = torch.tensor([2, 0, 1])
    found = sorted_chunks(ROWS, SIZES, order, probs)
    expected = sort_chunks_by_idxs(ROWS, SIZES, order, probs)
    assert torch.equal(found[0], expected[0])
    assert found[0].tolist() == [[4, 5], [6, 7], [8, 9], [0, 1], [2, 3]]
    assert (found[1] is None) == (probs is None)
    if found[1] is not None:
        assert found[1].tolist() == [2, 3, 4, 0, 1]
