"""What the processes of `processes.py` do with an actor: one rank's part of each case.

Every function builds workers from an `ActorSpec` in the layout that its sizes and the number of
processes give, the way the launcher does, and plans micro-batches the way `cluster.trainer` does.
"""

import contextlib
import resource
import threading
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from mcore_rl.algorithms.objectives import SftObjective
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.group import done
from mcore_rl.cluster.placement import colocated
from mcore_rl.config.run import train_layout
from mcore_rl.data.packing import plan_minibatch
from mcore_rl.errors import CheckpointError, UserError
from mcore_rl.metrics import to_floats
from mcore_rl.types import Offloads, Share, WriteState
from mcore_rl.workers.spec import WorkerSpec
from tests.actor_inputs import ONE_MICRO_BATCH

CPU = torch.device("cpu")


class SpmdWorkers:
    """A `WorkerGroup` in which every rank is its own controller: calls reach this rank alone, and
    the results of all ranks are gathered to every rank."""

    def __init__(self, worker):
        self.worker = worker
        self.world_size = dist.get_world_size()
        self.step = None

    def submit(self, calls):
        own, result = calls.get(dist.get_rank()), None
        if own is not None:
            result = self.worker.handlers[own.method](*own.args)
        results = [None] * self.world_size
        dist.all_gather_object(results, result)
        return {rank: done(results[rank]) for rank in calls}


@contextlib.contextmanager
def running_worker(spec, critic=None, offloads=None):
    """Yield this rank's worker, built from an ActorSpec and, if given, a ModelSpec of a critic and
    what is offloaded."""
    from mcore_rl.workers.worker import Worker

    size = dist.get_world_size()
    placement = colocated(train_layout(spec.megatron, size), size, engine_size=None)
    whole = WorkerSpec(
        placement=placement,
        actor=spec,
        engine=None,
        critic=critic,
        offloads=offloads or Offloads(),
    )
    worker = Worker(whole, CPU)
    try:
        yield worker
    finally:
        worker.close()
        # A mixture of experts keeps its last graph, whose hooks hold the wrapper, which holds the
        # model: a cycle through autograd that the garbage collector cannot see.
        for model in filter(None, (worker.actor, worker.critic)):
            for chunk in model.chunks:
                del chunk.module


@contextlib.contextmanager
def running_cluster(spec, cut):
    """Yield the loop's view of the workers, and this rank's worker."""
    with running_worker(spec) as worker:
        yield cluster_of(worker, cut), worker


def cluster_of(worker, cut, critic_cut=None, offloads=None):
    """Return the loop's view of the workers, each of which is its own controller."""
    size = dist.get_world_size()
    placement = colocated(worker.parallel.layout, size, engine_size=None)
    workers: Any = SpmdWorkers(worker)
    return Cluster.of(workers, placement, cut, critic_cut, offloads=offloads)


def exported(worker):
    """Return every tensor of the export, by Hugging Face name."""
    return {name: tensor.clone() for bucket in worker.actor.exporter for name, tensor in bucket}


def lists(numbers):
    """Return the numbers of each sequence as lists, which compare with ==."""
    return [of_sequence.tolist() for of_sequence in numbers]


def recorded_lists(cluster, worker, sequences):
    """Return (logprobs, routes) of each sequence as recorded; routes lie where they were."""
    recorded = cluster.trainer.record_logprobs(sequences)
    own = {at: worker.actor.routes.get(at.rank, at.key) for _, at in recorded if is_here(at)}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    held = {at: routes for of_rank in of_ranks for at, routes in of_rank.items()}
    return [(logprobs.tolist(), held[at]) for logprobs, at in recorded]


def is_here(at):
    """Whether this rank recorded the routes."""
    return at.rank == dist.get_rank()


def logprobs(spec, sequences, cut):
    """Return logprobs of every token by sequence."""
    with running_cluster(spec, cut) as (cluster, _):
        return lists(cluster.trainer.logprobs(sequences))


def layer_outputs(spec, sequences, cut):
    """Return what comes out of the layers for each sequence, by module."""
    with running_cluster(spec, cut) as (cluster, _):
        return cluster.trainer.layer_outputs(sequences)


def train(spec, minibatches, objective, cut):
    """Do a step of one update on each minibatch; return (metrics of each, exported weights,
    logprobs of the last minibatch's sequences under them).

    Every rank returns the same metrics and logprobs, those that the controller sees.
    """
    with running_cluster(spec, cut) as (cluster, worker):
        metrics = []
        for sequences in minibatches:
            cluster.trainer.begin_step()
            metrics.append(to_floats(cluster.trainer.update(sequences, objective)))
        logprobs = cluster.trainer.logprobs(minibatches[-1] if minibatches else [])
        return metrics, exported(worker), lists(logprobs)


def record_and_train(spec, sequences, objective, cut):
    """Return (logprobs, routes) of each sequence as recorded, then what `train` returns for a step
    on the sequences with the routes that they carry."""
    with running_cluster(spec, cut) as (cluster, worker):
        recorded = recorded_lists(cluster, worker, sequences)
    return recorded, *train(spec, [sequences], objective, cut)


def train_on_recorded(spec, sequences, objective, cut):
    """Record the routes of sequences, then train on all but the first, on routes as they lie in the
    workers, and from the start on routes as the controller has them; return (metrics and logprobs
    after the one, after the other, number of routes that were given to another rank)."""
    bare = [replace(sequence, routed_experts=None) for sequence in sequences]
    with running_cluster(spec, cut) as (cluster, worker):
        recorded = cluster.trainer.record_logprobs(bare)
        at = [
            replace(sequence, routed_experts=at)
            for sequence, (_, at) in zip(bare, recorded, strict=True)
        ][1:]
        held = recorded_lists(cluster, worker, bare)
        cluster.trainer.begin_step()
        metrics = to_floats(cluster.trainer.update(at, objective))
        first = metrics, lists(cluster.trainer.logprobs(bare))
        num_moved = num_given(worker)
        cluster.enter_step(1)
        assert not worker.actor.routes._held, "a step leaves no routes"
    arrays = [
        replace(sequence, routed_experts=routes)
        for sequence, (_, routes) in zip(bare, held, strict=True)
    ][1:]
    with running_cluster(spec, cut) as (cluster, _):
        cluster.trainer.begin_step()
        metrics = to_floats(cluster.trainer.update(arrays, objective))
        second = metrics, lists(cluster.trainer.logprobs(bare))
    return first, second, num_moved


def ratios_of_first_update(spec, minibatches, objective, cut, records):
    """Return (least, largest) ratio of new and old logprobs in the first of the updates: of the
    routes that the sequences carry, or, if `records`, of those that the pass records; then how many
    routes were given to another rank."""
    with running_cluster(spec, cut) as (cluster, worker):
        first = minibatches[0]
        if records:
            bare = [[replace(s, routed_experts=None) for s in part] for part in minibatches]
            known = cluster.trainer.record_logprobs(*bare)[: len(first)]
            first = [
                replace(sequence, old_logprobs=old, routed_experts=at)
                for sequence, (old, at) in zip(first, known, strict=True)
            ]
        else:
            known = cluster.trainer.logprobs(*minibatches)[: len(first)]
            first = [
                replace(sequence, old_logprobs=old)
                for sequence, old in zip(first, known, strict=True)
            ]
        cluster.trainer.begin_step()
        metrics = to_floats(cluster.trainer.update(first, objective))
        return metrics["actor/ratio/min"], metrics["actor/ratio/max"], num_given(worker)


def num_given(worker):
    """Return how many routes lie in ranks that did not record them."""
    given = torch.tensor(sum(rank != dist.get_rank() for rank, _ in worker.actor.routes._held))
    dist.all_reduce(given)
    return int(given)


def replayed_experts(routes):
    """Return which experts a router is given for `routes` [tokens, topk], nested lists."""
    from mcore_rl.megatron.router_replay import _LayerReplay

    replay = _LayerReplay(recomputes=False)
    replay.replay(torch.tensor(routes))
    assert replay.target_topk_idx is not None
    return replay.target_topk_idx.tolist()


def logits(spec, sequences):
    """Return the logits of every sequence's tokens but the last, [n - 1, vocab] each, from one
    packed row: the output layer's input times its weight, on one process."""
    captured = []
    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, worker):
        (chunk,) = worker.actor.chunks
        model: Any = chunk.module
        model.output_layer.register_forward_pre_hook(
            lambda _, args: captured.append(args[0].squeeze(1))
        )
        cluster.trainer.logprobs(sequences)
        weight = model.output_layer.weight
        if model.share_embeddings_and_output_weights:
            weight = model.shared_embedding_or_output_weight()
        (hidden_TH,) = captured
        logits_TV = (hidden_TH @ weight.t())[:, : model.real_vocab_size].detach()
    rows = [len(sequence.token_ids) - 1 for sequence in sequences]
    parts = logits_TV.split([max(1, n) for n in rows])  # one token alone is a row of padding
    return [part[:n].clone() for part, n in zip(parts, rows, strict=True)]


def gradients(spec, sequences, objective, cut):
    """Return the gradient of the objective for every Hugging Face tensor, and its metrics.

    For layouts in which no data-parallel rank holds a part of the gradient. Buffers, which have
    none, get zeros.
    """
    with running_worker(spec) as worker:
        actor = worker.actor
        metrics = backward(worker, sequences, objective, cut)
        return exported_gradients(worker, actor.params, actor.entries), metrics


def backward(worker, sequences, objective, cut):
    """Accumulate the gradient of the objective in the worker and return its metrics."""
    from mcore_rl.megatron.forward_backward import forward_backward

    actor, layout = worker.actor, worker.parallel.layout
    plan = plan_minibatch(sequences, layout.dp, cut)
    actor.optimizer.zero_grad()
    micro_batches = Share.of(sequences, plan.micro_batches[worker.place.dp])
    with actor.routers.replaying(micro_batches) as routes:
        metrics = forward_backward(
            actor.chunks,
            micro_batches,
            worker.parallel,
            CPU,
            lambda *args: objective(*args, plan.denominators),
            plan.denominators.num_tokens,
            objective.with_entropy,
            routes,
        )
    return to_floats(metrics)


def exported_gradients(worker, params, entries):
    """Return the gradients of parameters, zeros for those without, by Hugging Face name."""
    gradients = {
        name: getattr(param, "main_grad", torch.zeros_like(param)) for name, param in params.items()
    }
    return gathered(worker, gradients, entries)


def gathered(worker, params, entries):
    """Return the full tensors of what the ranks hold in parts, by Hugging Face name."""
    from mcore_rl.weight_sync.export import WeightExporter

    exporter = WeightExporter(params, entries, worker.parallel)
    return {name: tensor.clone() for bucket in exporter for name, tensor in bucket}


def policy_and_reference_logprobs(spec, sequences, cut):
    """Return logprobs of the initial policy, of the reference after training and of the policy
    after training."""
    with running_cluster(spec, cut) as (cluster, _):
        initial = lists(cluster.trainer.logprobs(sequences))
        for _ in range(10):
            cluster.trainer.begin_step()
            cluster.trainer.update(sequences, SftObjective())
        after = cluster.trainer.ref_logprobs(sequences), cluster.trainer.logprobs(sequences)
        return initial, *map(lists, after)


def policy_and_reference_with_routes(spec, sequences, other_sequences):
    """Return logprobs of policy and reference for both lists, then (logprobs, routes) recorded of
    the first: [policy, policy, reference, reference, recorded]."""
    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, worker):
        found = [cluster.trainer.logprobs(sequences), cluster.trainer.logprobs(other_sequences)]
        found += [
            cluster.trainer.ref_logprobs(sequences),
            cluster.trainer.ref_logprobs(other_sequences),
        ]
        return [*map(lists, found), recorded_lists(cluster, worker, sequences)]


def round_trip(spec, folder, sequences):
    """Export the loaded weights to this rank and to a model folder; return (names by bucket,
    tensors, logprobs of the sequences)."""
    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, worker):
        names = [[name for name, _ in bucket] for bucket in worker.actor.exporter]
        tensors = exported(worker)
        cluster.trainer.export_hf(folder)
        return names, tensors, lists(cluster.trainer.logprobs(sequences))


def received_in_buckets(spec, max_bytes, receivers):
    """Return [(name, tensor)] of each bucket that this rank gets."""
    with running_worker(spec) as worker:
        buckets = worker.actor.exporter.buckets(max_bytes, receivers)
        return [[(name, x.clone()) for name, x in bucket] for bucket in buckets]


def optimizer_state(worker):
    """Return this rank's part of Adam's state: (steps, moments), in the order of parameters."""
    inner = worker.actor.optimizer.inner
    steps, moments = [], []
    for one in getattr(inner, "chained_optimizers", [inner]):
        for group in one.optimizer.param_groups:
            steps.append(group.get("step", 0))
            for param in group["params"]:
                state = one.optimizer.state[param]
                moments += [state[key].clone() for key in ("exp_avg", "exp_avg_sq") if key in state]
    return steps, moments


@contextlib.contextmanager
def writers_held_back():
    """Yield an event before which no checkpoint is written: whatever comes between its beginning
    and its end has happened by then."""
    from mcore_rl.megatron import checkpoint

    write, may_write = checkpoint._write, threading.Event()

    def write_then(*args):
        may_write.wait()
        return write(*args)

    checkpoint._write = write_then
    try:
        yield may_write
    finally:
        may_write.set()
        checkpoint._write = write


def run_script(spec, script, cut=ONE_MICRO_BATCH):
    """Do the commands of `script` and return after each (metrics or None, weights, Adam's state).

    Commands: ("begin_step",), ("update", sequences, objective), ("begin_save", folder),
    ("end_save",), ("load", folder). There is one save at most.
    """
    with running_cluster(spec, cut) as (cluster, worker), writers_held_back() as may_write:
        answers = []
        for method, *args in script:
            if method == "end_save":
                may_write.set()
                assert cluster.trainer.end_save(wait=True)
                answer = None
            else:
                answer = getattr(cluster.trainer, method)(*args)
            metrics = to_floats(answer) if answer else None
            answers.append((metrics, exported(worker), optimizer_state(worker)))
        return answers


def checkpoint_tensors(folder):
    """Return every tensor of an actor's checkpoint in full: weights, masters and moments."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    from mcore_rl.megatron import cpu

    cpu.install()
    state = load_plain_tensors(str(folder))
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def failure_to_save(spec, folder, num_bytes):
    """Return the error of a checkpoint of which rank 1 may write no file of more than `num_bytes`;
    one before it, in the subfolder "first", succeeds."""
    files = resource.RLIMIT_FSIZE
    soft, hard = resource.getrlimit(files)
    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, _):
        cluster.trainer.begin_save(f"{folder}/first")
        assert cluster.trainer.end_save(wait=True)
        if dist.get_rank() == 1:
            resource.setrlimit(files, (num_bytes, hard))
        try:
            cluster.trainer.begin_save(f"{folder}/second")
            cluster.trainer.end_save(wait=True)
        except CheckpointError as error:
            return str(error)
        finally:
            resource.setrlimit(files, (soft, hard))


def failure_to_load(spec, folder):
    """Return the error of loading a checkpoint."""
    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, _):
        try:
            cluster.trainer.load(str(folder))
        except (CheckpointError, UserError) as error:
            return str(error)


def save_without(spec, folder, part):
    """Write a checkpoint that lacks one part of its state: "optimizer", "schedule"."""
    from mcore_rl.megatron import checkpoint

    with running_worker(spec) as worker:
        actor = worker.actor
        parts = actor.trained, actor.optimizer, worker.parallel
        shards, common = checkpoint._to_save(*parts)
        del common[part]
        kept = [shard for shard in shards if not shard.key.startswith(f"{part}.")]
        pending = checkpoint.PendingSave(folder, kept, common, worker.parallel)
        assert pending.state(wait=True) == WriteState(is_done=True)
        pending.finish()


def load_without(spec, name, ranks):
    """Load the weights into all parameters but those of `name` on some ranks; return what a user is
    told."""
    from mcore_rl.megatron.model import load_weights
    from mcore_rl.models.safetensors_io import CheckpointReader

    with running_worker(spec) as worker:
        params = {
            key: value
            for key, value in worker.actor.params.items()
            if key != name or worker.parallel.rank not in ranks
        }
        assert name in worker.actor.params or worker.parallel.layout.pp > 1
        try:
            load_weights(
                params, worker.actor.entries, CheckpointReader(spec.model_path), worker.parallel
            )
        except UserError as error:
            return str(error)
        return None
