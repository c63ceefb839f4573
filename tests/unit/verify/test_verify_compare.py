"""Differences of metrics and weights: their sizes, where they are, and what departs."""

from __future__ import annotations

import math

import pytest
import torch

from mcore_rl.models.safetensors_io import plan_shards, write_checkpoint
from mcore_rl.verify.compare import Difference, compare_metrics, compare_weights

EXPECTED = [
    {"actor/loss": 0.5, "actor/grad_norm": 4.0},
    {"actor/loss": -20.0, "actor/grad_norm": 0.5},
]


def test_metrics_are_compared_over_both_updates_each_on_its_scale():
    found = [
        {"actor/loss": 0.5 + 4e-5, "actor/grad_norm": 4.0},
        {"actor/loss": -20.0 + 2e-4, "actor/grad_norm": 0.5 + 1e-5},
    ]
    loss, norm = compare_metrics(found, EXPECTED, 3e-5)
    assert (loss.measure, loss.where, loss.departs) == ("loss", "update 1", True)
    assert (norm.measure, norm.where, norm.departs) == ("grad norm", "update 2", False)
    # Of float64; the sums 0.5 + 4e-5 and 0.5 + 1e-5 carry 1e-16.
    assert loss.size == pytest.approx(4e-5, rel=1e-9)
    assert norm.size == pytest.approx(2e-5, rel=1e-9)


@pytest.mark.parametrize(
    "second", [{"actor/loss": -20.0}, {"actor/loss": -20.0, "actor/grad_norm": math.nan}]
)
def test_a_skipped_update_and_a_nan_depart(second):
    loss, norm = compare_metrics([EXPECTED[0], second], EXPECTED, 1e-5)
    assert not loss.departs
    assert norm.departs
    assert norm.where == "update 2"


@pytest.fixture
def folders(tmp_path):
    """Return a function: tensors of three checkpoints -> their folders."""

    def write(found, expected, initial):
        named = {"found": found, "expected": expected, "initial": initial}
        for name, tensors in named.items():
            write_checkpoint(tmp_path / name, tensors.items(), plan_shards(tensors.items()))
        return [tmp_path / name for name in named]

    return write


def test_weights_are_compared_with_their_size_and_with_their_movement(folders):
    """A gradient that is wrong by half a percent hides in weights that hardly move, not in how far
    they moved."""
    initial = {"a": torch.zeros(2), "b": torch.tensor([1.0, -2.0])}
    expected = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([1.0, -2.001])}
    found = {"a": torch.tensor([1.0, 4.00002]), "b": torch.tensor([1.0, -2.001005])}
    weights, updates = compare_weights(*folders(found, expected, initial), tolerance=1e-5)
    assert (weights.where, weights.departs) == ("a", False)
    assert (updates.where, updates.departs) == ("b", True)
    # float32 tells 4 to 2.4e-7 and 2 to 1.2e-7.
    assert weights.size == pytest.approx(5e-6, rel=0.02)
    assert updates.size == pytest.approx(5e-3, rel=0.04)


def test_a_tensor_that_should_not_have_moved_departs_and_an_equal_one_does_not(folders):
    still, moved = {"a": torch.zeros(3)}, {"a": torch.tensor([0.0, 1e-9, 0.0])}
    same = folders(still, still, still)
    assert [d.size for d in compare_weights(*same, tolerance=1e-5)] == [0.0, 0.0]
    write_checkpoint(same[0].parent / "moved", moved.items(), plan_shards(moved.items()))
    weights, updates = compare_weights(same[0].parent / "moved", *same[1:], tolerance=1e-5)
    assert weights.departs
    assert updates.departs


def test_a_weight_that_is_not_a_number_departs_wherever_it_stands(folders):
    good = {name: torch.ones(2) for name in "abc"}
    bad = good | {"b": torch.tensor([1.0, math.nan])}
    initial = {name: torch.zeros(2) for name in "abc"}
    for difference in compare_weights(*folders(bad, good, initial), tolerance=1e-5):
        assert difference.departs
        assert difference.where == "b"


def test_an_export_that_lacks_a_tensor_is_no_comparison(folders):
    whole = {"a": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="1 tensors are not in both exports, first b"):
        compare_weights(*folders({"a": torch.ones(1)}, whole, whole), tolerance=1e-5)


def test_a_difference_reads_as_measure_size_and_place():
    assert str(Difference(measure="weights", where="model.norm.weight", size=0.012, limit=1)) == (
        "weights by 1.2e-02 (model.norm.weight)"
    )
