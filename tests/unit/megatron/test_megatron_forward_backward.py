"""What a rank of a layout that cuts rows hands to Megatron: the quickest case of
`tests/distributed/test_distributed_invariance.py`, which has every layout and objective."""

import itertools

import pytest

from mcore_rl.megatron.config import OptimConfig
from tests import actor_cases
from tests.actor_inputs import CP2, ONE_MICRO_BATCH, actor_spec, policy_objective, random_sequences
from tests.unit.megatron import forward_cases

# With epsilon 1 an update of Adam is proportional to the gradient, so a gradient of the wrong size
# shows in the weights; with the usual one only its sign would.
OPTIM = OptimConfig(lr=1.0, eps=1.0)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_sequences_cut_over_two_ranks_train_as_on_one(processes, tiny_checkpoint, mode):
    """The denominators of a loss count whole sequences, `num_tokens` what the rank holds."""
    objective = policy_objective("gpg", loss_agg_mode=mode)
    minibatch = random_sequences(1, lengths=(9, 3, 14))

    def trained(world_size, megatron):
        spec = actor_spec(tiny_checkpoint("qwen3"), optim=OPTIM, **megatron)
        args = spec, [minibatch], objective, ONE_MICRO_BATCH
        return processes.run(actor_cases.train, world_size, *args)

    [([expected], expected_weights, _)] = trained(1, {})
    for [metrics], weights, _ in trained(2, CP2):
        for key in ("actor/loss", "actor/grad_norm"):
            # float32 sums in another order.
            assert metrics[key] == pytest.approx(expected[key], rel=1e-5), key
        for name, weight in expected_weights.items():
            assert (weights[name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


@pytest.mark.parametrize("cut", [{}, CP2])
def test_boundaries_reach_the_attention_as_one_object(processes, tiny_checkpoint, cut):
    """Transformer Engine takes two objects for padding between sequences, whatever is in them, and
    then finds no attention before Hopper (dot_product_attention.py of 2.20, pad_between_seqs)."""
    size = cut.get("context_parallel_size", 1)
    spec = actor_spec(tiny_checkpoint("qwen3"), **cut)
    for is_one_object, boundaries, longest in processes.run(forward_cases.boundaries, size, spec):
        assert is_one_object
        assert boundaries[0] == 0
        assert max(b - a for a, b in itertools.pairwise(boundaries)) == longest
