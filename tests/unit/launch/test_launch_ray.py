"""What a run needs of a Ray cluster, and what is said of one that lacks it."""

from __future__ import annotations

import pytest

from mcore_rl.cluster.placement import colocated, engines_apart, servers_apart
from mcore_rl.launch import ray
from mcore_rl.types import Layout


@pytest.mark.parametrize(
    ("placement", "wanted"),
    [
        (colocated(Layout(dp=4), 2, 1), [2, 2]),
        (engines_apart(Layout(dp=4), 2, 2), [2, 2]),  # taking turns on the trainer's devices
        (engines_apart(Layout(dp=4), 4, 1, own_nodes=2, own_devices_per_node=3), [4, 3, 3]),
        (servers_apart(Layout(dp=4), 4, 3), [4]),
    ],
)
def test_a_bundle_holds_the_devices_of_a_node(placement, wanted):
    assert ray.bundles_of(placement, on_devices=False) == [{"CPU": float(n)} for n in wanted]
    on_devices = [{"CPU": float(n), "GPU": float(n)} for n in wanted]
    assert ray.bundles_of(placement, on_devices=True) == on_devices


@pytest.mark.parametrize(
    ("bundles", "nodes"),
    [
        ([4, 4], [4, 4]),
        ([4, 4], [8]),
        ([2, 4], [4, 2]),  # the small one does not take the room of the large one
        ([4, 2, 2], [5, 4]),
        ([], []),
    ],
)
def test_bundles_fit_where_each_has_a_node(bundles, nodes):
    assert ray.missing([{"CPU": n} for n in bundles], [{"CPU": n} for n in nodes]) is None


def test_what_a_cluster_lacks_is_said_with_what_it_has():
    wanted = [{"CPU": 8.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 8.0}]
    nodes = [{"CPU": 64.0, "GPU": 8.0, "memory": 1e9}, {"CPU": 64.0, "GPU": 4.0}, {"CPU": 4.0}]
    assert ray.missing(wanted, nodes) == (
        "wanted 8 CPU and 8 GPU + 8 CPU and 8 GPU, each on one node; the nodes have 64 CPU and "
        "8 GPU; 64 CPU and 4 GPU; 4 CPU and 0 GPU"
    )


def test_two_halves_of_a_bundle_on_two_nodes_are_not_enough():
    assert ray.missing([{"CPU": 4.0}], [{"CPU": 2.0}, {"CPU": 2.0}]) is not None


def test_processes_elsewhere_get_what_steers_libraries_and_no_secret():
    found = ray.forwarded(
        {
            "OMP_NUM_THREADS": "1",
            "MCORE_RL_PLUGINS": "my_loss",
            "MCORE_RL_CHANNEL_SECRET": "00",
            "HOME": "/home/me",
            "CUDA_VISIBLE_DEVICES": "3",
        }
    )
    assert found == {"OMP_NUM_THREADS": "1", "MCORE_RL_PLUGINS": "my_loss"}
