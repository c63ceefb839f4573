"""Which of torchrun's processes stand for which machine."""

from __future__ import annotations

import pytest

from mcore_rl.cluster.placement import colocated, engines_apart
from mcore_rl.errors import UserError
from mcore_rl.launch.torchrun import _first_ranks
from mcore_rl.types import Layout

TWO_NODES = Layout(dp=4)
APART = engines_apart(TWO_NODES, 2, 2, own_nodes=2, own_devices_per_node=4)
"""Two nodes of two workers, two of four devices for engines."""


def launch(monkeypatch, launched: int, here: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(launched))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))


@pytest.mark.parametrize(
    ("placement", "launched", "here", "first_ranks"),
    [
        (colocated(TWO_NODES, 2, 1), 4, 2, [0, 2]),
        (engines_apart(TWO_NODES, 2, 2), 4, 2, [0, 2]),  # on the trainer's devices
        (APART, 12, 2, [0, 2, 4, 8]),  # a process for each device of the engines
        (APART, 6, 2, [0, 2, 4, 5]),  # one for each of their nodes
        (engines_apart(Layout(dp=2), 2, 1, own_nodes=1, own_devices_per_node=2), 2, 2, [0]),
    ],
)
def test_the_first_process_of_each_machine_is_known(
    monkeypatch, placement, launched, here, first_ranks
):
    launch(monkeypatch, launched, here)
    assert _first_ranks(placement) == first_ranks


@pytest.mark.parametrize(
    ("placement", "launched", "message"),
    [
        (
            colocated(TWO_NODES, 2, 1),
            6,
            r"trainer\.n_gpus_per_node \* trainer\.nnodes=4 does not fit the 6 processes",
        ),
        (APART, 4, r"rollout\.nnodes=2 has no processes: torchrun started those of the trainer's"),
        (APART, 9, r"do not fit the 9 processes .* one process, or 4: 6 or 12 in all"),
    ],
)
def test_other_processes_than_the_placement_wants_are_refused(
    monkeypatch, placement, launched, message
):
    launch(monkeypatch, launched, 2)
    with pytest.raises(UserError, match=message):
        _first_ranks(placement)
