"""A checkpoint: written, read into another model, and the next update of both."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from gpu_checks.models import gmpo, parity_models, save_random_model, sequences_of
from gpu_checks.outcome import Bound, Outcome, Values, free_memory, now
from gpu_checks.sizes import Sizes
from gpu_checks.worker import exported, running
from mcore_rl.metrics import to_floats


def checkpoint(sizes: Sizes, device: torch.device) -> Outcome:
    """Weights that differ after the next update of a model that goes on and of one that resumes;
    and what writing takes on the device."""
    values: Values = {}
    with tempfile.TemporaryDirectory() as root:
        model, saved = Path(root) / "model", Path(root) / "saved"
        saved.mkdir()
        config = parity_models(sizes)["moe"]
        save_random_model(config, model, device)
        sequences = sequences_of(sizes.parity_lengths, config.vocab_size)
        with running(model, device, 2, dtype="bfloat16") as (cluster, worker):
            cluster.trainer.begin_step()
            cluster.trainer.update(sequences, gmpo())
            free_memory(device)
            held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            start = now(device)
            cluster.trainer.begin_save(str(saved))
            cluster.trainer.end_save(wait=True)
            values["save_s"] = now(device) - start
            parameters = sum(x.numel() for x in worker.actor.params.values())
            if device.type == "cuda":
                more = torch.cuda.max_memory_allocated() - held
                values["device_bytes_per_parameter"] = more / parameters
            cluster.trainer.begin_step()
            expected = to_floats(cluster.trainer.update(sequences, gmpo()))
            weights = exported(worker)
        with running(model, device, 2, dtype="bfloat16") as (cluster, worker):
            start = now(device)
            cluster.trainer.load(str(saved))
            values["load_s"] = now(device) - start
            cluster.trainer.begin_step()
            found = to_floats(cluster.trainer.update(sequences, gmpo()))
            resumed = exported(worker)
    values["other_weights"] = sum(
        not torch.equal(resumed[name], weight) for name, weight in weights.items()
    )
    values["grad_norm_difference"] = abs(found["actor/grad_norm"] - expected["actor/grad_norm"])
    same = "resuming continues what was saved, bit for bit"
    bounds = [
        Bound(name, values[name], 0, same) for name in ("other_weights", "grad_norm_difference")
    ]
    if device.type == "cuda":
        reason = "shards leave one after the other; nothing is gathered"
        name = "device_bytes_per_parameter"
        bounds.append(Bound(name, values[name], 4, reason))
    return Outcome(values, bounds)
