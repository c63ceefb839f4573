"""One optimizer update: here and in a process without CUDA, with one kind of layers and another,
with recomputation and without.

    python -m gpu_checks.update FOLDER OUT SIZES    # the process without CUDA
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpu_checks.models import gmpo, parity_models, save_random_model, sequences_of
from gpu_checks.outcome import Outcome, Values, relative_difference, relative_error, within
from gpu_checks.sizes import SIZES, Sizes
from gpu_checks.worker import exported, join, layers_here, running
from mcore_rl.metrics import to_floats

_OTHER_S = 300
TOOLS = Path(__file__).parents[1]

_RECOMPUTATION: dict[str, dict[str, Any]] = {
    "plain": {},
    "full recomputation": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "selective recomputation": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm"],
    },
}


def update_on_cpu(sizes: Sizes, device: torch.device) -> Outcome:
    """One GMPO update in float32 here and in a process without CUDA: metrics and weights."""
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        for family, config in parity_models(sizes).items():
            folder, answer = Path(root) / family, Path(root) / f"{family}.pt"
            save_random_model(config, folder, device)
            subprocess.run(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-m",
                    "gpu_checks.update",
                    folder,
                    answer,
                    device.type,
                ],
                check=True,
                timeout=_OTHER_S,
                cwd=TOOLS,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            )
            there: Any = torch.load(answer, weights_only=True)
            here = one_update(folder, sizes, device, dtype="float32")
            errors |= {f"{family}/{name}": x for name, x in differences(here, there).items()}
    reason = "float32 sums in another order; between layouts on CPU up to 1e-4 of what weights move"
    return within(errors, 1e-3, reason)


def update_layers(sizes: Sizes, device: torch.device) -> Outcome:
    """One GMPO update in bfloat16 by the local layers, and by every kind of layers that can run
    here with each kind of recomputation: metrics and weights. Rows have padding in them."""
    errors: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        for family, config in parity_models(sizes).items():
            folder = Path(root) / family
            save_random_model(config, folder, device)
            expected = None
            for kind in layers_here("bfloat16"):
                for name, override in _RECOMPUTATION.items():
                    found = one_update(
                        folder,
                        sizes,
                        device,
                        dtype="bfloat16",
                        transformer_impl=kind,
                        override_transformer_config=override,
                    )
                    expected = expected or found
                    metrics = differences(found, expected)
                    errors[f"{family}/{kind}, {name}"] = max(metrics.values())
    # A token that another expert gets moves other weights altogether, so experts are far apart.
    dense = {name: error for name, error in errors.items() if name.startswith("dense")}
    reason = "kernels round to bfloat16 in other places, and gradients are sums of such roundings"
    outcome = within(dense, 0.05, reason)
    experts = {name: error for name, error in errors.items() if name not in dense}
    routed = within(experts, 0.3, "as dense, and a token near a tie goes to another expert")
    return Outcome(errors, [*outcome.bounds, *routed.bounds])


def differences(found: Values, expected: Values) -> dict[str, float]:
    """Return relative differences of loss, gradient norm and how far the weights moved."""
    errors = {
        key: relative_difference(found["metrics"][key], expected["metrics"][key])
        for key in ("actor/pg_loss", "actor/grad_norm")
    }
    moved, wanted = (
        torch.cat([x["moved"][name].flatten() for name in expected["moved"]])
        for x in (found, expected)
    )
    return errors | {"weights_moved": relative_error(moved, wanted)}


def one_update(folder: Path, sizes: Sizes, device: torch.device, **megatron: Any) -> Values:
    """Return the metrics of one GMPO update and how far it moved every weight, on the host."""
    with running(folder, device, 2, **megatron) as (cluster, worker):
        before = exported(worker)
        vocab_size = int(before["model.embed_tokens.weight"].shape[0])
        cluster.trainer.begin_step()
        sequences = sequences_of(sizes.parity_lengths, vocab_size)
        metrics = to_floats(cluster.trainer.update(sequences, gmpo()))
        after = exported(worker)
    return {"metrics": metrics, "moved": {name: after[name] - before[name] for name in before}}


def main() -> None:
    folder, answer, sizes = sys.argv[1:]
    # Where it is installed Megatron would have its kernels, which take no host tensors.
    sys.modules["transformer_engine"] = None  # pyright: ignore[reportArgumentType]
    device = torch.device("cpu")
    join(device)
    torch.save(one_update(Path(folder), SIZES[sizes], device, dtype="float32"), answer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
