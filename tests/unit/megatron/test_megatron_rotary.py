"""Rotary embedding of packed rows: Megatron's numbers, with boundaries that are read once."""

import pytest
import torch

from tests.unit.megatron import rotary_cases


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "num_turned", "mscale"),
    [(torch.float32, 16, 1.0), (torch.bfloat16, 16, 1.0), (torch.float32, 8, 1.3)],
    ids=["float32", "bfloat16", "half of each head, yarn"],
)
def test_the_numbers_are_those_of_megatron_bit_for_bit(
    processes, world_size, dtype, num_turned, mscale
):
    arguments = dtype, num_turned, mscale
    for ours, megatrons in processes.run(rotary_cases.turned_both_ways, world_size, *arguments):
        for found, expected in zip(ours[:2], megatrons[:2], strict=True):
            assert torch.equal(found, expected)
        assert ours[2] == 1  # reads of the boundaries
        assert megatrons[2] >= 2


def test_what_is_kept_with_a_row_serves_equal_angles_alone(processes):
    assert processes.run(rotary_cases.other_angles, 1) == [[True] * 3]
