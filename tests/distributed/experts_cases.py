"""What test_distributed_experts.py runs in processes."""

from typing import Any
from unittest import mock

from mcore_rl.megatron.experts import GroupedExperts
from tests import actor_cases
from tests.actor_inputs import ONE_MICRO_BATCH


def train_grouped(spec, minibatches, objective, cut):
    """Return what `actor_cases.train` does, with all experts by grouped products, and how often
    they were."""
    calls = []

    def grouped(self, rows, tokens_per_expert, probs):
        calls.append(tokens_per_expert.tolist())
        return self.grouped(rows, tokens_per_expert, probs)

    with mock.patch.object(GroupedExperts, "forward", grouped):
        return *actor_cases.train(spec, minibatches, objective, cut), calls


def can_be_grouped(spec, with_hook):
    """Return whether the experts of each layer can be grouped, the first of which gets a hook."""
    with actor_cases.running_cluster(spec, ONE_MICRO_BATCH) as (_, worker):
        (chunk,) = worker.actor.chunks
        layers = [module for module in chunk.modules() if isinstance(module, GroupedExperts)]
        if with_hook:
            second: Any = layers[0].local_experts[1]
            second.linear_fc2.register_forward_pre_hook(lambda *_: None)
        return [layer.can_be_grouped() for layer in layers]
