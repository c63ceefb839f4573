"""Routes of experts: recorded and replayed alike in every layout; routers that stay as they are."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from mcore_rl.algorithms.objectives import SftObjective
from mcore_rl.data.packing import SequenceCount
from mcore_rl.megatron.config import OptimConfig
from tests import actor_cases
from tests.actor_inputs import (
    CP2,
    EP2,
    ETP1,
    FULL_RECOMPUTE,
    ONE_MICRO_BATCH,
    PP2,
    TP2,
    VPP2,
    actor_spec,
    layout_id,
    policy_objective,
    random_sequences,
)

# As in test_distributed_invariance: an update is proportional to the gradient.
OPTIM = OptimConfig(lr=1.0, eps=1.0)
NAME = "qwen3_moe_four_layers"  # experts in its layers 1 and 3
NUM_LAYERS, NUM_EXPERTS, TOPK = 2, 4, 2
OBJECTIVE = policy_objective("gpg")
HIT_FRAC = "moe/replay_hit_frac"

LAYOUTS = [
    (1, FULL_RECOMPUTE, 2),
    (2, {}, 3),
    (2, TP2, 3),
    (2, TP2 | FULL_RECOMPUTE, 1000),
    (2, CP2, 2),
    (2, EP2, 3),
    (2, PP2 | FULL_RECOMPUTE, 2),
    (2, VPP2, 1),
    (2, VPP2 | FULL_RECOMPUTE, 2),
    (4, TP2 | CP2 | EP2 | ETP1, 3),
    (4, PP2 | TP2 | FULL_RECOMPUTE, 1),
    (4, PP2 | CP2, 1000),
]


@pytest.fixture(scope="module")
def spec_of(tiny_checkpoint):
    """Return a function (**megatron) -> spec."""
    return lambda **megatron: actor_spec(tiny_checkpoint(NAME), optim=OPTIM, **megatron)


def with_random_routes(sequences, seed):
    """Return the sequences with routes that no router chose."""
    source = np.random.default_rng(seed)

    def routes(sequence):
        scores = source.random((len(sequence.token_ids) - 1, NUM_LAYERS, NUM_EXPERTS))
        return scores.argsort(axis=-1)[..., :TOPK].astype(np.uint8)

    return [replace(sequence, routed_experts=routes(sequence)) for sequence in sequences]


SEQUENCES = with_random_routes(random_sequences(1), seed=2)


@pytest.fixture(scope="module")
def one_process(processes, spec_of):
    """What one process with one micro-batch records and makes of SEQUENCES."""
    args = spec_of(), SEQUENCES, OBJECTIVE, ONE_MICRO_BATCH
    return processes.run(actor_cases.record_and_train, 1, *args)[0]


def largest_difference(found, expected):
    """Return the largest absolute difference of two lists of lists."""
    pairs = [p for f, e in zip(found, expected, strict=True) for p in zip(f, e, strict=True)]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize(("world_size", "megatron", "size"), LAYOUTS, ids=layout_id)
def test_routes_are_recorded_and_replayed_alike_in_every_layout(
    processes, spec_of, one_process, world_size, megatron, size
):
    """Proves that each layout, with several micro-batches and with layers computed again in the
    backward, records the routes of one process and trains on given routes as one process does.

    That one process replays the right ones, the next test proves.
    """
    recorded, (metrics,), weights, logprobs = one_process
    args = spec_of(**megatron), SEQUENCES, OBJECTIVE, SequenceCount(num_sequences=size)
    for found in processes.run(actor_cases.record_and_train, world_size, *args):
        found_recorded, (found_metrics,), found_weights, found_logprobs = found
        for (_, routes), (_, expected) in zip(found_recorded, recorded, strict=True):
            assert routes.dtype == np.uint8
            assert np.array_equal(np.sort(routes), np.sort(expected))
        assert (
            largest_difference(
                [values for values, _ in found_recorded], [values for values, _ in recorded]
            )
            <= 1e-4
        )  # float32, as in test_distributed_invariance
        assert found_metrics[HIT_FRAC] == pytest.approx(metrics[HIT_FRAC], abs=1e-12)
        for key in ("actor/loss", "actor/grad_norm"):
            assert found_metrics[key] == pytest.approx(metrics[key], rel=1e-5, abs=1e-5), key
        for name, weight in weights.items():
            difference = float((found_weights[name] - weight).abs().max())
            # float32 sums in another order.
            assert difference <= 1e-5 * float(weight.abs().max()), name
        assert largest_difference(found_logprobs, logprobs) <= 1e-4


def test_the_replay_of_a_routers_own_choice_changes_nothing_and_other_routes_do(
    processes, spec_of, one_process
):
    """Proves that routes reach the tokens and layers that they belong to: the gradient of every
    tensor is that of the routers' own choice, that of the routers among them, and every choice is
    one that the router makes too. With random routes it differs, and the routers get a gradient."""
    recorded, (random_metrics,), *_ = one_process
    bare = [replace(sequence, routed_experts=None) for sequence in SEQUENCES]
    own = [
        replace(sequence, routed_experts=routes)
        for sequence, (_, routes) in zip(SEQUENCES, recorded, strict=True)
    ]
    cut = SequenceCount(num_sequences=3)
    plain, replayed, random = (
        processes.run(actor_cases.gradients, 1, spec_of(), sequences, OBJECTIVE, cut)[0][0]
        for sequences in (bare, own, SEQUENCES)
    )
    for name, gradient in plain.items():
        size = float(gradient.abs().max())
        assert size > 0, name
        # float32; the softmax over the experts sums in the order of the routes.
        assert float((replayed[name] - gradient).abs().max()) <= 1e-5 * size, name
        assert float((random[name] - gradient).abs().max()) > 1e-2 * size, name
        assert float(random[name].abs().max()) > 0, name
    routers = [name for name in plain if name.endswith("mlp.gate.weight")]
    assert len(routers) == NUM_LAYERS
    run = processes.run(actor_cases.train, 1, spec_of(), [own], OBJECTIVE, cut)
    assert run[0][0][0][HIT_FRAC] == 1.0
    # Two of four experts at random: half of them are among the two of the router.
    assert random_metrics[HIT_FRAC] == pytest.approx(0.5, abs=0.15)


def test_the_reference_routes_by_itself(processes, tiny_checkpoint):
    """Proves that policy and reference, with the same weights, do not share their replay."""
    spec = actor_spec(tiny_checkpoint(NAME), with_reference=True)
    bare = [replace(sequence, routed_experts=None) for sequence in SEQUENCES]
    policy, replayed, reference, reference_with_routes, recorded = processes.run(
        actor_cases.policy_and_reference_with_routes, 1, spec, bare, SEQUENCES
    )[0]
    assert reference == policy
    assert reference_with_routes == policy
    assert [values for values, _ in recorded] == policy
    assert largest_difference(replayed, policy) > 0.1


def test_padding_is_given_experts_that_exist_and_differ(processes):
    found = processes.run(actor_cases.replayed_experts, 1, [[2, 0, 3], [-1, -1, -1]])[0]
    assert found == [[2, 0, 3], [0, 1, 2]]


def test_a_checkpoint_that_asks_for_an_auxiliary_loss_trains_without_it(
    processes, tiny_checkpoint, tmp_path
):
    """Proves that no bit of the gradient depends on what the Hugging Face config says of it."""
    folder = shutil.copytree(tiny_checkpoint(NAME), tmp_path / "with_auxiliary_loss")
    config = json.loads((folder / "config.json").read_text())
    config |= {"router_aux_loss_coef": 100.0, "output_router_logits": True}
    (folder / "config.json").write_text(json.dumps(config))
    bare = [replace(sequence, routed_experts=None) for sequence in SEQUENCES]
    (expected, _), (found, _) = (
        processes.run(actor_cases.gradients, 1, actor_spec(path), bare, OBJECTIVE, ONE_MICRO_BATCH)[
            0
        ]
        for path in (tiny_checkpoint(NAME), folder)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("world_size", "megatron"),
    [(1, {}), (1, {"dtype": "bfloat16"}), (2, {}), (4, TP2 | PP2 | EP2 | ETP1), (2, CP2)],
    ids=layout_id,
)
def test_frozen_routers_stay_as_they_are(processes, spec_of, tmp_path, world_size, megatron):
    """Proves that routers keep every bit through updates and a checkpoint, are exported, and that
    everything else trains."""
    spec = spec_of(moe_router_freeze=True, **megatron)
    update = ("update", SEQUENCES, SftObjective())
    save = [("begin_save", str(tmp_path)), ("end_save",)]
    script = [("begin_step",), update, update, *save, update, ("load", str(tmp_path)), update]
    first = processes.run(actor_cases.run_script, world_size, spec, script)[0]
    begun, *_, saved, third, loaded, again = first
    for name, before in begun[1].items():
        for _, weights, _ in (saved, third, again):
            is_router = name.endswith("mlp.gate.weight")
            assert torch.equal(weights[name], before) == is_router, name
        assert torch.equal(loaded[1][name], saved[1][name])
        assert torch.equal(again[1][name], third[1][name])
    assert sum(name.endswith("mlp.gate.weight") for name in begun[1]) == NUM_LAYERS


def test_routes_that_lie_in_other_workers_are_given_to_those_that_replay_them(processes, spec_of):
    """Proves that a step on recorded routes, which lie where they were recorded, is that on the
    same routes sent by the controller, also where the ranks that replay them are others."""
    cut = SequenceCount(num_sequences=2)
    # A pipeline alone has one data-parallel rank, whose first rank keeps what it will replay.
    for world_size, megatron, moves in ((2, {}, True), (2, PP2, False), (4, TP2, True)):
        args = spec_of(**megatron), SEQUENCES, OBJECTIVE, cut
        found = processes.run(actor_cases.train_on_recorded, world_size, *args)
        for recorded, sent, num_moved in found:
            assert recorded == sent
            assert (num_moved > 0) == moves


@pytest.mark.parametrize(
    ("world_size", "megatron"),
    [(1, {}), (2, {}), (4, TP2 | PP2), (4, TP2 | EP2 | ETP1), (4, PP2 | FULL_RECOMPUTE)],
    ids=layout_id,
)
def test_the_ratio_of_the_first_update_is_one_to_the_last_bit_under_replay(
    processes, spec_of, world_size, megatron
):
    """Proves that the pass for the old logprobs computes each sequence as the update will: with the
    same experts, in the same micro-batch; and that routes which a pass recorded stay there.

    Of these the ratio is 1 up to rounding: the padding of a row chose experts of its own when they
    were recorded, and is given others in replay, so an expert's product has another size.
    """
    minibatches, cut = [SEQUENCES[:5], SEQUENCES[5:]], SequenceCount(num_sequences=2)
    args = spec_of(**megatron), minibatches, policy_objective("vanilla"), cut
    case = actor_cases.ratios_of_first_update
    assert processes.run(case, world_size, *args, False) == [(1.0, 1.0, 0)] * world_size
    for least, largest, num_given in processes.run(case, world_size, *args, True):
        # float32; 4.8e-7 observed with two ranks of tensor and pipeline, 0.0 without padding.
        assert 1 - 1e-5 < least <= largest < 1 + 1e-5
        assert num_given == 0
