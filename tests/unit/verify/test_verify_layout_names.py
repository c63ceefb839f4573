"""Names of layouts become sizes, numbers of processes and overrides."""

from __future__ import annotations

import pytest

from mcore_rl.errors import UserError
from mcore_rl.verify.layout_names import parse_layout, parse_layouts


@pytest.mark.parametrize(
    ("name", "num_processes", "dp"),
    [
        ("dp1", 1, 1),
        ("tp2", 2, 1),
        ("tp2sp0", 2, 1),
        ("cp2", 2, 1),
        ("pp2vpp2", 2, 1),
        ("dp3", 3, 3),
        ("tp2pp2dp2", 8, 2),
        ("ep2", 2, 2),  # experts are spread over data-parallel ranks
        ("ep2dp4", 4, 4),
        ("tp2ep2", 4, 2),  # etp is tp
        ("tp2ep2etp1", 2, 1),
        ("tp2ep4etp1", 4, 2),
        ("tp2pp2ep2etp1", 4, 1),
        ("cp2ep4", 4, 2),
        ("pp2tp4", 8, 1),
    ],
)
def test_a_layout_takes_the_fewest_processes_that_hold_it(name, num_processes, dp):
    layout = parse_layout(name)
    assert (layout.num_processes, layout.dp) == (num_processes, dp)


def test_a_name_becomes_the_keys_that_a_run_is_given():
    assert parse_layout("pp2tp4vpp3cp5ep6etp7dp42sp0").overrides == [
        "actor.megatron.tensor_model_parallel_size=4",
        "actor.megatron.pipeline_model_parallel_size=2",
        "actor.megatron.virtual_pipeline_model_parallel_size=3",
        "actor.megatron.context_parallel_size=5",
        "actor.megatron.expert_model_parallel_size=6",
        "actor.megatron.expert_tensor_parallel_size=7",
        "actor.megatron.sequence_parallel=false",
        "trainer.n_gpus_per_node=1680",
    ]
    assert parse_layout("dp1").overrides == ["trainer.n_gpus_per_node=1"]


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("", "is not made of"),
        ("tp", "is not made of"),
        ("2", "is not made of"),
        ("tp0", "is not made of"),
        ("tp2x", "is not made of"),
        ("xtp2", "is not made of"),
        ("tp2 pp2", "is not made of"),
        ("tp02", "is not made of"),
        ("tp2sp1", "is not made of"),
        ("TP2", "is not made of"),
        ("tp2tp4", "names an axis twice"),
        ("sp0", "turns sequence parallelism off"),
        ("pp2sp0", "turns sequence parallelism off"),
    ],
)
def test_a_bad_name_is_refused_with_the_rule_it_breaks(name, rule):
    with pytest.raises(UserError, match=rf"^--layouts='{name}' {rule}"):
        parse_layout(name)


def test_a_list_is_kept_in_order_and_names_nothing_twice():
    assert [layout.name for layout in parse_layouts("pp2, tp2")] == ["pp2", "tp2"]
    with pytest.raises(UserError, match="names tp2 twice"):
        parse_layouts("tp2,pp2,tp2")
    with pytest.raises(UserError, match="is not made of"):
        parse_layouts("tp2,")
