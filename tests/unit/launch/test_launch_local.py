"""Which devices an engine of its own sees on the controller's machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mcore_rl.cluster.placement import engines_apart
from mcore_rl.launch.local import EngineProcesses
from mcore_rl.types import Layout


class Started:
    """Writes down the environment that each rank is started with."""

    def __init__(self):
        self.devices = {}

    def start(self, rank, module, environment, options):
        assert options["rank"] == rank
        self.devices[rank] = environment["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize(
    ("own", "devices"),
    [
        ({}, {4: "0,1", 5: "2,3"}),
        ({"own_nodes": 1, "own_devices_per_node": 4}, {4: "4,5", 5: "6,7"}),
        ({"own_nodes": 2, "own_devices_per_node": 2}, {4: "4,5", 5: "6,7"}),
    ],
)
def test_engines_see_the_trainers_devices_or_those_behind_them(own, devices):
    children: Any = Started()
    folder: Any = SimpleNamespace(path="nowhere")
    EngineProcesses(children, "fake", folder, engines_apart(Layout(dp=4), 4, 2, **own))
    assert children.devices == devices
