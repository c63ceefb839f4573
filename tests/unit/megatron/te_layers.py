"""A program: Transformer Engine's layers beside the local ones, without a device.

Builds every tiny model in several layouts twice, on the meta device, and prints one line of JSON:
how many parameters were compared, the kinds of Transformer Engine's modules, and what differs. No
rank has a process: a layout's groups are torch's fake ones. It needs Transformer Engine with its
extension for torch, which can be imported where no driver is; what asks for a device is told that
there is one.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from mcore_rl.config.run import train_layout
from mcore_rl.megatron import cpu, model, parallel
from mcore_rl.megatron.config import MegatronConfig
from mcore_rl.models.spec import load_hf_config, model_family
from tests.tiny_models import MODELS, save_tiny_checkpoint

TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, TP2),
    (2, {"pipeline_model_parallel_size": 2}),
    (2, EP2),
    (2, TP2 | EP2 | {"expert_tensor_parallel_size": 1}),
    (4, TP2 | EP2),
]


def parameters(
    folder: Path, sizes: dict[str, Any], world_size: int, rank: int, impl: str
) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """Return (name: shape and type of this rank's parameters, name in a checkpoint: whole shape,
    kinds of Transformer Engine's modules)."""
    cfg = MegatronConfig(dtype="bfloat16", **sizes)
    hf_config = load_hf_config(str(folder))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        for owner, name, value in (
            (dist, "get_backend", lambda *_: "gloo"),  # no other group for the host
            (parallel, "_share_group", lambda *_: None),
            (model, "transformer_impl", lambda _: impl),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        groups = parallel.initialize(train_layout(cfg, world_size), seed=0)
        stack.callback(parallel.shut_down)
        config = model.build_transformer_config(hf_config, cfg, groups)
        config.perform_initialization = False
        if impl == "transformer_engine":
            config.init_model_with_meta_device, config.use_cpu_initialization = True, False
            there_is_one = mock.patch.object(torch.cuda, "is_available", return_value=True)
            stack.enter_context(there_is_one)
        with torch.device("meta"):
            chunks = model.build_chunks(hf_config, config, groups, temperature=1.0)
        local = model.named_local_parameters(chunks, groups)
        saved = {}
        for chunk in chunks:
            state: Any = chunk.sharded_state_dict(metadata={"singleton_local_shards": False})
            for value in state.values():
                # An `_extra_state` is of FP8; loading passes over it (checkpoint.py).
                if hasattr(value, "global_shape") and not value.key.endswith("_extra_state"):
                    saved[value.key] = list(value.global_shape)
        kinds = {type(module).__name__ for chunk in chunks for module in chunk.modules()}
    found = {name: [*param.shape, str(param.dtype)] for name, param in local.items()}
    return found, saved, {kind for kind in kinds if kind.startswith("TE")}


def main() -> None:
    cpu.install()
    num, num_saved, kinds, differing = 0, 0, set[str](), []
    for name in MODELS:
        folder = Path(sys.argv[1]) / name
        save_tiny_checkpoint(name, folder)
        hf_config = load_hf_config(str(folder))
        has_experts = "num_moe_experts" in model_family(hf_config).transformer_kwargs(hf_config)
        for world_size, sizes in LAYOUTS:
            if EP2.items() <= sizes.items() and not has_experts:
                continue
            for rank in range(world_size):
                ours, saved, _ = parameters(folder, sizes, world_size, rank, "local")
                theirs, also_saved, used = parameters(
                    folder, sizes, world_size, rank, "transformer_engine"
                )
                num, num_saved, kinds = num + len(theirs), num_saved + len(saved), kinds | used
                for one, other in ((ours, theirs), (saved, also_saved)):
                    differing += [
                        f"{name} {sizes} rank {rank}: {key}: {one.get(key)}, {other.get(key)}"
                        for key in sorted(one.keys() | other.keys())
                        if one.get(key) != other.get(key)
                    ]
    result = {"parameters": num, "saved": num_saved, "kinds": sorted(kinds)}
    print(json.dumps(result | {"differing": differing}))


if __name__ == "__main__":
    main()
