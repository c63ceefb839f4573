"""Training goes on from a checkpoint as if it had not stopped, in the same or another layout."""

import actor_cases
import pytest
import torch
from actor_inputs import (
    EP2,
    ETP1,
    PP2,
    TP2,
    VPP2,
    actor_spec,
    layout_id,
    policy_objective,
    random_sequences,
)

from mcore_rl.data.packing import SequenceCount
from mcore_rl.megatron.config import OptimConfig

# An epsilon of the size of gradients: the update depends on both moments and is not so sensitive to
# gradients near 0 that rounding shows. The rate differs in every step.
OPTIM = OptimConfig(lr=0.05, eps=0.01, lr_warmup_steps=8)
OBJECTIVE = policy_objective("vanilla", entropy_coeff=0.01)
CUT = SequenceCount(num_sequences=3)


def steps(seeds):
    """Return the commands of one step for each seed."""
    return [
        command
        for seed in seeds
        for command in (("begin_step",), ("update", random_sequences(seed), OBJECTIVE))
    ]


@pytest.fixture
def continued(processes, tiny_checkpoint, tmp_path):
    """Return a function: train three steps in one layout, save, train two more there, and train
    the same two in fresh workers of another layout that load the checkpoint.

    It returns what every rank of the first and of the second had after loading or saving and after
    each of the two steps: (metrics, weights, Adam's state).
    """

    def run(name, saved_in, loaded_in):
        folder = tmp_path / "actor"
        folder.mkdir()
        runs = []
        for (world_size, megatron), first in (
            (saved_in, [*steps(range(3)), ("save", str(folder))]),
            (loaded_in, [("load", str(folder))]),
        ):
            spec = actor_spec(tiny_checkpoint(name), optim=OPTIM, **megatron)
            script = [*first, *steps((3, 4))]
            by_rank = processes.run(actor_cases.run_script, world_size, spec, script, CUT)
            runs.append([[answers[-5], answers[-3], answers[-1]] for answers in by_rank])
        return runs

    return run


@pytest.mark.parametrize(
    ("name", "world_size", "megatron"),
    [
        ("qwen3", 1, {}),
        ("qwen3", 2, {"use_distributed_optimizer": False}),
        ("qwen2_tied", 2, VPP2),
        ("qwen3_moe", 2, EP2),
        ("qwen3_moe", 2, TP2 | ETP1),
        ("qwen3_moe", 2, EP2 | {"dtype": "bfloat16"}),  # masters in float32
    ],
    ids=layout_id,
)
def test_the_same_layout_goes_on_bit_by_bit(continued, name, world_size, megatron):
    """Weights, moments, step counters, learning rate and metrics, on every rank."""
    saved, loaded = continued(name, (world_size, megatron), (world_size, megatron))
    for rank in range(world_size):
        for expected, found in zip(saved[rank], loaded[rank], strict=True):
            metrics, weights, (counters, moments) = found
            assert metrics == expected[0]
            assert weights.keys() == expected[1].keys()
            assert all(torch.equal(weights[key], expected[1][key]) for key in weights)
            assert counters == expected[2][0]
            assert len(moments) == len(expected[2][1]) > 0
            assert all(map(torch.equal, moments, expected[2][1]))
        assert [metrics["actor/lr"] for metrics, *_ in loaded[rank][1:]] == pytest.approx(
            [0.05 * 4 / 8, 0.05 * 5 / 8], rel=1e-6
        )


@pytest.mark.parametrize(
    ("name", "saved_in", "loaded_in"),
    [
        ("qwen3", (2, TP2), (1, {})),
        ("qwen2_tied", (2, PP2), (2, TP2)),
        ("qwen2_tied", (2, VPP2), (1, {})),
        ("qwen3_moe", (2, TP2 | ETP1), (2, EP2)),
        ("qwen3_moe", (1, {}), (2, TP2)),
    ],
)
def test_another_layout_goes_on_alike(continued, name, saved_in, loaded_in):
    """Weights bit by bit after loading; metrics and weights of two more steps up to rounding.

    With tied embeddings on two stages the optimizer's state lies in several padded buckets, which
    Megatron-Core 0.16.1 alone would save wrongly.
    """
    saved, loaded = continued(name, saved_in, loaded_in)
    at_save, *expected_steps = saved[0]
    for rank in loaded:
        after_load, *found_steps = rank
        assert all(torch.equal(after_load[1][key], at_save[1][key]) for key in at_save[1])
        for (metrics, weights, _), (expected, expected_weights, _) in zip(
            found_steps, expected_steps, strict=True
        ):
            assert metrics["actor/lr"] == expected["actor/lr"]
            # float32 sums in another order; observed 3.1e-7 (gradient norm), 3e-8 (loss), and
            # 1.6e-7 of the largest weight of a tensor.
            for key in ("actor/loss", "actor/grad_norm"):
                assert metrics[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-6)
            for key, weight in expected_weights.items():
                difference = (weights[key] - weight).abs().max() / weight.abs().max()
                assert difference <= 1e-6, key
