"""What one rank of a real actor has, for comparison with its plan."""

from typing import Any

import torch

from tests.actor_cases import running_cluster
from tests.actor_inputs import ONE_MICRO_BATCH


def place_and_parameters(spec):
    """Return (coordinates, elements of trained parameters, of all weights, numbers of layers)."""
    with running_cluster(spec, ONE_MICRO_BATCH) as (_, worker):
        place = (worker.parallel.rank, *worker.parallel.coordinates)
        params = [p for chunk in worker.actor.chunks for p in chunk.parameters()]
        chunks: Any = worker.actor.chunks
        layers = {
            layer.layer_number - 1 for chunk in chunks for layer in chunk.module.decoder.layers
        }
        tensors = dict(worker.actor.params)
        if worker.actor.lora:
            tensors |= worker.actor.lora.params
        held = sum(tensor.numel() for tensor in tensors.values())
        trained = sum(param.numel() for param in params if param.requires_grad)
        return place, trained, held, sorted(layers)


def bytes_of_a_step(spec, sequences, objective):
    """Return (weights, gradient buffers, optimizer state, activations) in bytes, the last those
    that autograd saved in a step of one micro-batch."""
    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, worker):
        actor = worker.actor
        weights = {_storage(p): _bytes(p) for p in actor.params.values()}
        saved = {}

        def remember(tensor):
            if _storage(tensor) not in weights:
                saved[_storage(tensor)] = tensor  # kept, or its storage would be given out again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            cluster.trainer.begin_step()
            cluster.trainer.update(sequences, objective)
        chunks: Any = actor.chunks
        gradients = sum(
            _bytes(buffer.grad_data)
            for chunk in chunks
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        )
        optimizer = 0
        inner = actor.optimizer.inner
        for one in getattr(inner, "chained_optimizers", [inner]):
            for group in one.optimizer.param_groups:
                for param in group["params"]:
                    state = one.optimizer.state[param]
                    optimizer += sum(_bytes(state[key]) for key in ("exp_avg", "exp_avg_sq"))
                    if _storage(param) not in weights:
                        optimizer += _bytes(param)  # a float32 copy
        activations = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        held = sum(_bytes(param) for param in actor.params.values())
        return held, gradients, optimizer, activations


def _bytes(tensor):
    return tensor.numel() * tensor.element_size()


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()
