"""What the processes are asked to do in the tests of LoRA."""

import torch

from mcore_rl.errors import UserError
from mcore_rl.metrics import to_floats
from tests.actor_cases import backward, exported_gradients, gathered, lists, running_cluster
from tests.actor_inputs import ONE_MICRO_BATCH


def adapters(worker):
    """Return the full halves of all adapters, by Hugging Face name."""
    lora = worker.actor.lora
    return gathered(worker, lora.params, lora.entries)


@torch.no_grad()
def fill_b(worker):
    """Give every B, which begins as zeros, random values that do not depend on the layout."""
    from mcore_rl.megatron.model import shard_group
    from mcore_rl.models.mappings import hf_shapes, take, to_megatron

    lora = worker.actor.lora
    for entry in lora.entries:
        param = lora.params.get(entry.megatron_name)
        if param is None or not entry.megatron_name.endswith("lora_B"):
            continue
        generator = torch.Generator().manual_seed(len(entry.megatron_name))
        full = {
            name: 0.1 * torch.randn(shape, generator=generator)
            for name, shape in hf_shapes(entry).items()
        }
        group = shard_group(entry, worker.parallel)
        read = lambda name, rows, cols, full=full: take(full[name], rows, cols)  # noqa: E731
        param.copy_(to_megatron(entry, group.rank(), group.size(), read))


def train(spec, minibatches, objective, cut):
    """Do a step of one update on each minibatch; return (metrics of each, adapters before, after,
    logprobs of the last minibatch, whether the base is what it was)."""
    with running_cluster(spec, cut) as (cluster, worker):
        base = {name: param.clone() for name, param in worker.actor.params.items()}
        before, metrics = adapters(worker), []
        for sequences in minibatches:
            cluster.trainer.begin_step()
            metrics.append(to_floats(cluster.trainer.update(sequences, objective)))
        after, logprobs = adapters(worker), lists(cluster.trainer.logprobs(minibatches[-1]))
        return metrics, before, after, logprobs, is_unchanged(worker.actor.params, base)


def gradients_and_export(spec, sequences, objective, cut, folder):
    """Fill every B, train nothing, export; return (metrics, what was found by name)."""
    with running_cluster(spec, cut) as (cluster, worker):
        lora, params = worker.actor.lora, worker.actor.params
        assert lora is not None
        base = {name: param.clone() for name, param in params.items()}
        initial_logprobs = lists(cluster.trainer.logprobs(sequences))
        fill_b(worker)
        logprobs = lists(cluster.trainer.logprobs(sequences))
        ref_logprobs = lists(cluster.trainer.ref_logprobs(sequences))
        metrics = backward(worker, sequences, objective, cut)
        gradients = exported_gradients(worker, lora.params, lora.entries)
        worker.actor.export_hf(folder)
        return metrics, {
            "initial_logprobs": initial_logprobs,
            "logprobs": logprobs,
            "ref_logprobs": ref_logprobs,
            "adapters": adapters(worker),
            "gradients": gradients,
            "base_is_the_same": is_unchanged(params, base),
        }


def sent_separately(spec, max_bytes, folder):
    """Fill every B, export into `folder`; return the weights and the adapters that a sync brings,
    by the names that it has for them."""
    with running_cluster(spec, ONE_MICRO_BATCH) as (_, worker):
        fill_b(worker)
        worker.actor.export_hf(folder)
        base, adapters = worker.actor.separate_exporters()
        return [
            {name: tensor.clone() for bucket in one.buckets(max_bytes) for name, tensor in bucket}
            for one in (base, adapters)
        ]


def is_unchanged(params, before):
    return all(torch.equal(param, before[name]) for name, param in params.items())


def identity(spec):
    """Return what a checkpoint must have in common with a run."""
    with running_cluster(spec, ONE_MICRO_BATCH) as (_, worker):
        assert worker.actor.lora is not None
        return worker.actor.lora.identity


def save_and_export(spec, minibatch, objective, cut, folder, out):
    """Do one update from filled halves, save a checkpoint into `folder`, export into `out`; return
    (full halves, whether the base is what it was)."""
    with running_cluster(spec, cut) as (cluster, worker):
        base = {name: param.clone() for name, param in worker.actor.params.items()}
        fill_b(worker)
        cluster.trainer.begin_step()
        cluster.trainer.update(minibatch, objective)
        cluster.trainer.begin_save(folder)
        cluster.trainer.end_save(wait=True)
        worker.actor.export_hf(out)
        return adapters(worker), is_unchanged(worker.actor.params, base)


def save_and_load(spec, others, folder):
    """Save a checkpoint of `spec`; return what loading it says in the workers of each other spec,
    None where it is loaded."""
    with running_cluster(spec, ONE_MICRO_BATCH) as (cluster, _):
        cluster.trainer.begin_save(folder)
        cluster.trainer.end_save(wait=True)
    answers = []
    for other in others:
        with running_cluster(other, ONE_MICRO_BATCH) as (cluster, _):
            try:
                cluster.trainer.load(folder)
                answers.append(None)
            except UserError as error:
                answers.append(str(error))
    return answers
