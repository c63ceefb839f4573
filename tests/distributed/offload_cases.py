"""What one rank does whose parts are moved to host memory: each case, with and without."""

import ctypes
import gc
from dataclasses import replace

import torch

from mcore_rl.algorithms.objectives import CriticObjective
from mcore_rl.cluster.phases import Phase
from mcore_rl.errors import OffloadError
from mcore_rl.metrics import to_floats
from mcore_rl.types import Denominators, Offloads, Part
from tests.actor_cases import cluster_of, exported, lists, optimizer_state, running_worker
from tests.actor_inputs import ONE_MICRO_BATCH

VALUE_OBJECTIVE = CriticObjective(
    cliprange_value=0.3, agg_mode="seq-mean-token-mean", loss_scale_factor=1.0
)


def there_and_back(spec, critic, sequences, objective):
    """Move all parts of a trained actor and critic away and back, part by part; return by model
    and part (bytes, whether nothing was left, whether all came back bit for bit)."""
    with running_worker(spec, critic) as worker:
        trainer = cluster_of(worker, ONE_MICRO_BATCH, ONE_MICRO_BATCH if critic else None).trainer
        trainer.update(sequences, objective)
        if critic:
            trainer.update_critic(with_values(sequences), VALUE_OBJECTIVE)
        found = {}
        models = filter(None, (worker.actor, worker.critic))
        held = {
            (model.role, part): storages
            for model in models
            for part, storages in storages_by_part(model).items()
        }
        addresses = [s.data_ptr() for storages in held.values() for s in storages]
        assert len(set(addresses)) == len(addresses), "parts share no storage"
        before = {key: [bytes_of(s) for s in storages] for key, storages in held.items()}
        everything = sum(map(sum, ((len(b) for b in of_part) for of_part in before.values())))
        for (role, part), storages in held.items():
            model = getattr(worker, role)
            size = sum(s.nbytes() for s in storages)
            model.offload([part])
            is_empty = not any(s.nbytes() for s in storages)
            left = sum(s.nbytes() for of_part in held.values() for s in of_part)
            assert left == everything - size, "no other part moved"
            model.restore([part])
            same = all(map(torch.equal, map(bytes_of, storages), before[role, part]))
            found[role, part] = size, is_empty, same
        return found


def storages_by_part(model):
    """Return the storages of a worker's model by part, found without what is tested."""
    lists = {
        Part.PARAM: [param for chunk in model.chunks for param in chunk.parameters()],
        Part.GRAD: [
            param.main_grad
            for chunk in model.chunks
            for param in chunk.parameters()
            if param.requires_grad
        ],
        Part.OPTIMIZER: [],
    }
    if getattr(model, "reference", None):
        lists[Part.REFERENCE] = [p for chunk in model.reference for p in chunk.parameters()]
    for one in model.optimizer.inner.chained_optimizers:
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            lists[Part.OPTIMIZER] += [p for group in getattr(one, name, []) for p in group]
        for state in one.optimizer.state.values():
            lists[Part.OPTIMIZER] += [state["exp_avg"], state["exp_avg_sq"]]
    return {
        part: list({t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values())
        for part, tensors in lists.items()
    }


def bytes_of(storage):
    return torch.empty(0, dtype=torch.uint8).set_(storage).clone()


def with_values(sequences):
    """Return what a critic is trained on."""
    numbers = [[0.1 * trains for trains in sequence.loss_mask] for sequence in sequences]
    return [
        replace(sequence, advantages=None, values=of_one, returns=of_one)
        for sequence, of_one in zip(sequences, numbers, strict=True)
    ]


def run(spec, critic, offloads, sequences, objective, folder):
    """Do two steps as a loop does, with a checkpoint and its reading between, and an export;
    return every number on the way, all weights and the optimizer's state at the end."""
    critic_cut = ONE_MICRO_BATCH if critic else None
    with running_worker(spec, critic, offloads) as worker:
        cluster = cluster_of(worker, ONE_MICRO_BATCH, critic_cut, offloads)
        trainer, numbers, weights = cluster.trainer, [], None
        for step in range(2):
            cluster.phases.enter(Phase.SYNC)
            weights = exported(worker)
            cluster.phases.enter(Phase.GENERATE)
            assert_away(worker, offloads)
            numbers.append(lists(trainer.logprobs(sequences)))
            if spec.with_reference or spec.lora:
                numbers.append(lists(trainer.ref_logprobs(sequences)))
            if critic:
                numbers.append(lists(trainer.values(sequences)))
                trainer.begin_critic_step()
                values = with_values(sequences)
                numbers.append(to_floats(trainer.update_critic(values, VALUE_OBJECTIVE)))
            trainer.begin_step()
            for _ in range(2):
                numbers.append(to_floats(trainer.update(sequences, objective)))
            if step == 0:
                trainer.begin_save(folder)
                cluster.phases.enter(Phase.GENERATE)  # while the files are written
                assert trainer.end_save(wait=True)
                trainer.load(folder)
        trainer.export_hf(f"{folder}/hf_model")
        cluster.phases.enter(Phase.SYNC)
        weights = weights, exported(worker)
        cluster.phases.enter(Phase.SAVE)
        return numbers, weights, optimizer_state(worker)


def assert_away(worker, offloads):
    for role in ("actor", "critic"):
        if model := getattr(worker, role):
            wanted = {f"{role}.{part}" for part in getattr(offloads, role)}
            assert {one.name for one in model.parts.values() if one.is_away} == wanted


def resident_bytes(spec, sequences, objective):
    """Return (bytes of the parts, resident set with all of them in place, in host memory, and with
    the copies there let go)."""
    parts = [Part.PARAM, Part.GRAD, Part.OPTIMIZER]
    with running_worker(spec) as worker:
        cluster_of(worker, ONE_MICRO_BATCH).trainer.update(sequences, objective)
        size = sum(
            s.nbytes() for of_part in storages_by_part(worker.actor).values() for s in of_part
        )
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        resident = [resident_set()]
        worker.actor.offload(parts)
        resident.append(resident_set())
        for part in parts:
            worker.actor.parts[part]._away = None
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return size, *resident, resident_set()


def resident_set():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def refusals(spec, critic, sequences, objective, folder):
    """Return by call what a worker says that is asked for it with everything in host memory."""
    offloads = Offloads(
        actor=frozenset([Part.PARAM, Part.GRAD, Part.OPTIMIZER, Part.REFERENCE]),
        critic=frozenset([Part.PARAM, Part.GRAD, Part.OPTIMIZER]),
    )
    told = {}
    with running_worker(spec, critic, offloads) as worker:
        actor, critic = worker.actor, worker.critic
        assert critic is not None
        calls = {
            "logprobs": lambda: actor.logprobs(None),
            "record_logprobs": lambda: actor.record_logprobs(None),
            "layer_outputs": lambda: actor.layer_outputs(None),
            "ref_logprobs": lambda: actor.ref_logprobs(None),
            "export": lambda: list(actor.exporter),
            "export_hf": lambda: actor.export_hf(folder),
            "values": lambda: critic.values(None),
            "begin_save": lambda: critic.begin_save(folder),
            "load": lambda: actor.load(folder),
            "offload": lambda: actor.offload([Part.GRAD]),
        }
        for name, call in calls.items():
            told[name] = failure(call)
        actor.restore([Part.PARAM])
        told["restore"] = failure(lambda: actor.restore([Part.PARAM]))
        counts = Denominators(num_tokens=1, num_sequences=1)
        told["update"] = failure(lambda: actor.train_on([], counts, objective))
        actor.restore([Part.GRAD, Part.OPTIMIZER])
        next(actor.chunks[0].parameters()).detach().numpy()
        told["numpy"] = failure(lambda: actor.offload([Part.PARAM]))
        assert not actor.parts[Part.PARAM].is_away
    return told


def failure(call):
    try:
        call()
    except OffloadError as error:
        return str(error)
    raise AssertionError("nothing was refused")
