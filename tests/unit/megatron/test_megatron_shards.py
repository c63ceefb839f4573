"""A range of numbers as rectangles."""

import itertools
import math

import pytest
import torch

from mcore_rl.megatron.shards import rectangles


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (1, 6), (5, 1), (2, 3, 4), (2, 1, 2, 3)])
def test_rectangles_are_the_numbers_of_a_range_in_order(shape):
    """For every range: put where they say, they fill it and nothing else, and they are few."""
    count = math.prod(shape)
    for first, last in itertools.combinations_with_replacement(range(count + 1), 2):
        flat, at, filled = torch.arange(first, last), 0, torch.full(shape, -1)
        found = list(rectangles(shape, first, last))
        for offsets, sizes in found:
            place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            part = flat[at : at + math.prod(sizes)].view(sizes)
            assert filled[place].shape == part.shape
            filled[place] = part
            at += part.numel()
        numbers = torch.arange(count)
        expected = torch.where((numbers >= first) & (numbers < last), numbers, -1)
        assert torch.equal(filled.view(-1), expected)
        assert len(found) <= max(1, 2 * len(shape) - 1)


def test_whole_rows_stay_one_rectangle():
    assert list(rectangles((4, 6), 6, 18)) == [((1, 0), (2, 6))]
    assert list(rectangles((6, 4), 2, 15)) == [((0, 2), (1, 2)), ((1, 0), (2, 4)), ((3, 0), (1, 3))]
