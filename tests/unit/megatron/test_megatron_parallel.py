"""Process groups: which of them are of gloo."""

from mcore_rl.processes import collective_backend
from mcore_rl.types import Layout
from tests.unit.megatron import parallel_cases as cases


def test_the_default_group_on_cuda_is_of_nccl_alone():
    """What Megatron makes is as the default group: gloo beside NCCL would be a mesh of sockets for
    each of its groups, thousands at 512 ranks."""
    assert collective_backend("cuda") == "nccl"
    assert collective_backend("cpu") == "gloo"


def test_host_objects_meet_in_gloo_groups_and_nothing_of_megatrons_has_gloo(processes):
    """The default group is one that moves nothing between hosts, so what should go by gloo and does
    not would leave every rank with nothing."""
    answers = processes.run(cases.backends_beside_another, 4, Layout(tp=2, etp=2, dp=2))
    for backends, _ in answers:
        assert {name for name, kind in backends.items() if kind == "gloo"} == {"share", "host"}
        assert len(backends) > 8
    assert [share for _, share in answers] == [[0, 1], [0, 1], [2, 3], [2, 3]]
