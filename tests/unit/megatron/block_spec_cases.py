"""What a process of `processes.py` does for the tests of the layer specs."""

from typing import Any

from tests.actor_cases import running_worker


def checkpoint_names(spec):
    """Return (names of the parameters of the one chunk, their names in a checkpoint by those)."""
    with running_worker(spec) as worker:
        (chunk,) = worker.actor.chunks
        module: Any = chunk.module
        # Both kinds of tensor in it, plain and built from parts, carry their name as `key`.
        state = module.sharded_state_dict(metadata={"singleton_local_shards": False})
        names = {name: value.key for name, value in state.items() if hasattr(value, "key")}
        return [name for name, _ in module.named_parameters()], names


def activations(spec):
    """Return the kinds of activation that MLPs, experts and shared experts call."""
    from megatron.core.transformer.mlp import MLP

    with running_worker(spec) as worker:
        (chunk,) = worker.actor.chunks
        mlps: list[Any] = [module for module in chunk.modules() if isinstance(module, MLP)]
        names = {
            getattr(mlp.activation_func, "__name__", type(mlp.activation_func).__name__)
            for mlp in mlps
        }
        return sorted(names)
