"""What the processes of `processes.py` do with the checkpoint of an actor, below the loop."""

import contextlib
import queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.actor_cases import exported, optimizer_state, running_cluster
from tests.actor_inputs import ONE_MICRO_BATCH, policy_objective, random_sequences

OBJECTIVE = policy_objective("vanilla")
COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all"),
    *("all_to_all_single", "broadcast", "gather", "gather_object", "reduce", "reduce_scatter"),
    *("reduce_scatter_tensor", "scatter", "send", "recv", "barrier"),
)


@contextlib.contextmanager
def no_collectives():
    """Have every collective operation fail."""

    def refuse(*_, **__):
        raise AssertionError("a collective operation")

    kept = {name: getattr(dist, name) for name in COLLECTIVES}
    dist.__dict__.update(dict.fromkeys(COLLECTIVES, refuse))
    try:
        yield
    finally:
        dist.__dict__.update(kept)


def save_counting(spec, folder):
    """Save after one update; return the bytes that this rank copies, and those of its file."""
    from mcore_rl.megatron import checkpoint

    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, worker):
        cluster.trainer.begin_step()
        cluster.trainer.update(random_sequences(0, vocab_size=512), OBJECTIVE)
        parts = worker.actor.trained, worker.actor.optimizer, worker.parallel
        with no_collectives():
            shards, _ = checkpoint._to_save(*parts)
            copied = sum(shard.numbers.nbytes for shard in shards)
            pending = checkpoint.begin_save(Path(folder), *parts)
            assert not pending.state(wait=True).problem
        pending.finish()
        return copied, (Path(folder) / f"__{dist.get_rank()}_0.distcp").stat().st_size


def save_by_megatron(spec, folder):
    """Save after one update by Megatron's own code, as checkpoints were written before each
    rank wrote for itself; return weights and Adam's state."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from mcore_rl.megatron import checkpoint

    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, worker):
        cluster.trainer.begin_step()
        cluster.trainer.update(random_sequences(0), OBJECTIVE)
        actor = worker.actor
        state = actor.trained.sharded_state()
        state["optimizer"] = actor.optimizer.inner.sharded_state_dict(
            dict(state), metadata=checkpoint._metadata(worker.parallel)
        )
        state["identity"] = {**actor.trained.identity, **actor.optimizer.identity}
        state["schedule"] = {"num_steps": actor.optimizer.schedule.num_steps}
        filesystem_async._results_queue = queue.SimpleQueue()  # no process is to be started
        strategy = get_default_save_sharded_strategy("torch_dist")
        request: Any = dist_checkpointing.save(state, folder, strategy, async_sharded_save=True)
        if request.async_fn is not None:
            write_here(request)
        for finalize in request.finalize_fns:
            finalize()
        return exported(worker), optimizer_state(worker)


def write_here(request):
    """Do what Megatron does in processes that it forks."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    transforms, _ = request.async_fn.args
    _, buckets, results = request.async_fn_args
    written = {}
    for number, bucket in enumerate(buckets):
        answers: Any = queue.SimpleQueue()
        unfinished: Any = queue.Queue()
        unfinished.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, answers, unfinished, use_fsync=True
        )
        _, written[number] = answers.get()
    results.put(written)


def loaded(spec, folder):
    """Return weights and Adam's state after loading a checkpoint."""
    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, worker):
        with torch.no_grad():
            for chunk in worker.actor.chunks:
                for param in chunk.parameters():
                    param.fill_(float("nan"))
        cluster.trainer.load(str(folder))
        return exported(worker), optimizer_state(worker)
