"""Training checkpoints in Megatron's distributed format: model, optimizer, schedule.

Any layout reads what any other wrote ("fully_reshardable"). There are no random states in it:
training draws no random numbers, since dropout is refused. What the controller knows (step, place
in the data) is saved beside it by `loop/resume.py`, which also makes the folder appear at once.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel

from mcore_rl.megatron.optimizer import PolicyOptimizer
from mcore_rl.megatron.parallel import Parallel


def save_checkpoint(
    folder: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: PolicyOptimizer,
    parallel: Parallel,
) -> None:
    """Write everything that training needs to go on; collective.

    Args:
        folder: exists, is empty and is seen by every rank.
        chunks: model chunks wrapped for training.
        optimizer: theirs.
        parallel: process groups.
    """
    for one in _parts(optimizer.inner):
        # Adam makes its moments in its first update; a run may have skipped all so far.
        one.init_state_fn(one.optimizer, one.config)
    state = _sharded_state(chunks, optimizer, parallel, is_loading=False)
    state["schedule"] = optimizer.schedule.state_dict()
    # Written while this call lasts, so the results need no queue in a process of its own
    # (filesystem_async.py:51), which takes seconds to start and outlives a rank that is killed.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(state, str(folder), get_default_save_sharded_strategy("torch_dist"))


def load_checkpoint(
    folder: Path,
    chunks: Sequence[DistributedDataParallel],
    optimizer: PolicyOptimizer,
    parallel: Parallel,
) -> None:
    """Read back what `save_checkpoint` wrote; collective, whatever layout wrote it."""
    wanted = _sharded_state(chunks, optimizer, parallel, is_loading=True)
    state: Any = dist_checkpointing.load(
        wanted, str(folder), get_default_load_sharded_strategy(str(folder))
    )
    for index, chunk in enumerate(chunks):
        _model(chunk).load_state_dict(state[f"model{index}"])
    with torch.no_grad():  # float32 parameters are views into leaves
        optimizer.inner.load_state_dict(state["optimizer"])
    optimizer.schedule.load_state_dict(state["schedule"])


def load_model(folder: Path, chunks: Sequence[torch.nn.Module], parallel: Parallel) -> None:
    """Fill chunks that are not wrapped for training from a distributed checkpoint; collective.

    Args:
        folder: what `save_checkpoint` or `mcore-rl convert hf-to-mcore` wrote; of its content only
            the weights are read.
        chunks: of `build_chunks`, in any layout.
        parallel: process groups.
    """
    wanted = {f"model{index}": _weights(chunk, parallel) for index, chunk in enumerate(chunks)}
    state: Any = dist_checkpointing.load(
        wanted, str(folder), get_default_load_sharded_strategy(str(folder))
    )
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(state[f"model{index}"], strict=False)
        assert not unexpected and all(map(_is_extra_state, missing)), (missing, unexpected)


def _weights(chunk: Any, parallel: Parallel) -> dict[str, Any]:
    """Return the sharded state of a chunk without extra states: they are nothing but Transformer
    Engine's factors of FP8, and which modules have one depends on the layer specs."""
    state = chunk.sharded_state_dict(metadata=_metadata(parallel))
    return {name: value for name, value in state.items() if not _is_extra_state(name)}


def _is_extra_state(name: str) -> bool:
    return name.endswith("_extra_state")


def _sharded_state(
    chunks: Sequence[DistributedDataParallel],
    optimizer: PolicyOptimizer,
    parallel: Parallel,
    is_loading: bool,
) -> dict[str, Any]:
    metadata = _metadata(parallel)
    state: dict[str, Any] = {
        f"model{index}": _model(chunk).sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }
    with _padding_kept(optimizer.inner):
        state["optimizer"] = optimizer.inner.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=metadata
        )
    return state


def _metadata(parallel: Parallel) -> dict[str, Any]:
    """Return what says how Megatron names and cuts what it saves."""
    return {
        # The default of 0.16.1 is a type that it can no longer load (distrib_optimizer.py:1226).
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel.dp_cp,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _parts(optimizer: Any) -> list[Any]:
    """Return Megatron's optimizers, of which a chain has one for experts apart."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


@contextlib.contextmanager
def _padding_kept(optimizer: Any) -> Iterator[None]:
    """Have the state of a distributed optimizer gathered with the padding between its buckets.

    Megatron gathers it without (distrib_optimizer.py:1027) and then cuts each parameter out at its
    place with it (:1500), so after a padded bucket every parameter would be saved with a
    neighbour's numbers and the last ones with zeros. There is more than one bucket with tied
    embeddings on two stages, and with `overlap_grad_reduce` in a large model.
    """
    parts = [
        (part, numel)
        for one in _parts(optimizer)
        for buffer in getattr(one, "buffers", [])
        for part, numel in (
            (buffer, buffer.numel),
            *((bucket, bucket.grad_data.numel()) for bucket in buffer.buckets),
        )
    ]
    unpadded = [part.numel_unpadded for part, _ in parts]
    for part, numel in parts:
        part.numel_unpadded = numel
    try:
        yield
    finally:
        for (part, _), numel in zip(parts, unpadded, strict=True):
            part.numel_unpadded = numel


def _model(chunk: DistributedDataParallel) -> Any:
    return chunk.module
