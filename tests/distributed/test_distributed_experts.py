"""Experts by grouped products give what experts one after the other give."""

import pytest

from mcore_rl.megatron.config import OptimConfig
from tests import actor_cases
from tests.actor_inputs import (
    EP2,
    ETP1,
    FULL_RECOMPUTE,
    LORA,
    ONE_MICRO_BATCH,
    TP2,
    actor_spec,
    layout_id,
    policy_objective,
    random_sequences,
)
from tests.distributed import experts_cases

OBJECTIVE = policy_objective("geo_mean", clip_ratio=0.1)
# As in test_distributed_invariance.py: weights show a gradient of a wrong size.
OPTIM = OptimConfig(lr=1.0, eps=1.0, weight_decay=0.001)

LAYOUTS = [
    ("qwen3_moe", 1, {}),
    ("qwen3_moe", 1, FULL_RECOMPUTE),
    ("qwen3_moe", 2, EP2),
    ("qwen3_moe", 2, TP2),
    ("qwen3_moe", 2, TP2 | ETP1),
    ("deepseek_v3", 1, {}),
]


@pytest.mark.parametrize(("name", "world_size", "megatron"), LAYOUTS, ids=layout_id)
def test_an_update_is_that_of_experts_one_after_the_other(
    processes, tiny_checkpoint, name, world_size, megatron
):
    spec = actor_spec(tiny_checkpoint(name), optim=OPTIM, **megatron)
    minibatches = [random_sequences(1), random_sequences(2, (4,))]  # the second leaves some idle
    run = spec, minibatches, OBJECTIVE, ONE_MICRO_BATCH
    expected = processes.run(actor_cases.train, world_size, *run)
    found = processes.run(experts_cases.train_grouped, world_size, *run)
    rows_of_experts = [counts for *_, calls in found for counts in calls]
    assert any(0 in counts for counts in rows_of_experts)
    assert any(min(counts) > 1 for counts in rows_of_experts)
    for (metrics, weights, logprobs), (*others, _) in zip(expected, found, strict=True):
        for step, other in zip(metrics, others[0], strict=True):
            for key in ("actor/loss", "actor/grad_norm"):
                # float32 sums in another order.
                assert other[key] == pytest.approx(step[key], rel=1e-6, abs=1e-6), key
        for key, weight in weights.items():
            difference = float((others[1][key] - weight).abs().max())
            assert difference <= 1e-6 * float(weight.abs().max()), key
        assert others[2] == [pytest.approx(of_sequence, abs=1e-5) for of_sequence in logprobs]


def test_experts_that_something_hangs_on_are_called(processes, tiny_checkpoint):
    folder = tiny_checkpoint("qwen3_moe")
    plain = actor_spec(folder)
    adapted = actor_spec(folder, lora=LORA)

    def grouped(spec, with_hook=False):
        return processes.run(experts_cases.can_be_grouped, 1, spec, with_hook)[0]

    assert all(grouped(plain))
    assert grouped(plain, True) == [False, *grouped(plain)[1:]]
    assert not any(grouped(adapted))
