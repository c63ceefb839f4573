"""`python -m mcore_rl.doctor.probe`: what may crash or hang, in a process of its own.

Each probe leaves an object with what it found in the folder, or ends with one line on why not.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mcore_rl.doctor.children import ANSWER_FILE
from mcore_rl.launch.libraries import quiet_libraries
from mcore_rl.processes import collective_backend, die_with_parent

_COLLECTIVE_S = 60.0
_SEED = 17
TOKENS = (3, 11, 2, 29, 7, 23, 5)
"""What the forward pass scores and the engine continues."""

Values = dict[str, Any]


def import_name(folder: Path, name: str) -> Values:
    """Import "module" or "module:attribute", as a run does."""
    module, _, attribute = name.partition(":")
    imported = importlib.import_module(module)
    if attribute:
        getattr(imported, attribute)
    return {}


def devices(folder: Path) -> Values:
    """Ask torch for its CUDA devices."""
    import torch
    import torch.cuda.nccl

    torch.cuda.init()
    return {
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "kinds": torch.cuda.get_arch_list(),
        "devices": [_device(number) for number in range(torch.cuda.device_count())],
    }


def _device(number: int) -> Values:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    major, minor = torch.cuda.get_device_capability(number)
    name = torch.cuda.get_device_name(number)
    return {"name": name, "free": free, "total": total, "kind": f"sm_{major}{minor}"}


def all_reduce(folder: Path, backend: str, store: str, rank: str, world_size: str) -> Values:
    """Add up the ranks by a collective of all of them.

    Args:
        folder: not used.
        backend: "gloo" on the CPU, "nccl" on the device that this process sees.
        store: "file:PATH" or "tcp:HOST:PORT:PREFIX", where they meet.
        rank: of this process.
        world_size: number of ranks.
    """
    import torch
    import torch.distributed as dist

    size = int(world_size)
    dist.init_process_group(
        backend,
        store=_store(store, size),
        rank=int(rank),
        world_size=size,
        timeout=datetime.timedelta(seconds=_COLLECTIVE_S),
    )
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    numbers = torch.full((1024,), float(rank), device=device)
    dist.all_reduce(numbers)
    expected = size * (size - 1) / 2
    if not bool((numbers == expected).all()):
        raise RuntimeError(f"the sum of {size} ranks is {numbers[0].item()}, not {expected}")
    dist.destroy_process_group()
    return {}


def _store(where: str, world_size: int) -> Any:
    from torch.distributed import (
        FileStore,  # pyright: ignore[reportPrivateImportUsage]
        PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
        TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    )

    kind, _, rest = where.partition(":")
    if kind == "file":
        return FileStore(rest, world_size)
    host, port, prefix = rest.rsplit(":", 2)
    return PrefixStore(prefix, TCPStore(host, int(port), is_master=False, wait_for_workers=False))


def forward(folder: Path) -> Values:
    """Score a few tokens by a model of one layer, in Megatron as a run does and in transformers;
    return the largest difference."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from mcore_rl.megatron import cpu, parallel
    from mcore_rl.megatron.config import MegatronConfig
    from mcore_rl.megatron.forward_backward import forward_tokens
    from mcore_rl.megatron.model import (
        build_chunks,
        build_transformer_config,
        load_weights,
        named_local_parameters,
    )
    from mcore_rl.models.reference import build_reference
    from mcore_rl.models.safetensors_io import CheckpointReader
    from mcore_rl.models.spec import load_hf_config, model_family
    from mcore_rl.types import Layout, MicroBatch, TokenSequence

    _write_model(folder, "float32")
    cpu.install()
    backend = collective_backend("cuda" if torch.cuda.is_available() else "cpu")
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    groups = parallel.initialize(Layout(), _SEED)
    hf_config = load_hf_config(folder)
    megatron_config = MegatronConfig(dtype="float32", transformer_impl="local")
    config = build_transformer_config(hf_config, megatron_config, groups)
    chunks = build_chunks(hf_config, config, groups, temperature=1.0)
    params = named_local_parameters(chunks, groups)
    entries = model_family(hf_config).entries(hf_config)
    load_weights(params, entries, CheckpointReader(folder), groups)
    token_ids = np.array(TOKENS, np.int32)
    sequence = TokenSequence(token_ids=token_ids, loss_mask=np.arange(len(TOKENS)) > 0)
    device = next(iter(params.values())).device
    found = forward_tokens(chunks, [MicroBatch.of([sequence])], groups, device).numbers[1:]
    with torch.no_grad():
        logits = build_reference(folder, torch.float32)(torch.tensor([TOKENS])).logits[0, :-1]
    labels = torch.tensor(TOKENS[1:]).unsqueeze(-1)
    expected = logits.log_softmax(-1).gather(-1, labels).squeeze(-1).numpy()
    return {"difference": float(np.abs(found - expected).max()), "device": str(device)}


def token(folder: Path) -> Values:
    """Have vLLM take the weights of a model of one layer and draw one token; return it."""
    import numpy as np
    import torch

    from mcore_rl.models.safetensors_io import CheckpointReader
    from mcore_rl.rollout import load_engine
    from mcore_rl.rollout.base import EngineSpec, GenerationRequest, RolloutConfig, SamplingParams
    from mcore_rl.weight_sync.base import Link
    from mcore_rl.weight_sync.sync import sync_one

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"  # as a run has it
    _write_model(folder, dtype)
    config = RolloutConfig(kv_cache_memory_bytes=32 << 20, max_num_seqs=1, enforce_eager=True)
    spec = EngineSpec(
        model_path=str(folder),
        dtype=dtype,
        max_model_len=64,
        stop_token_ids=[],
        config=config,
        run_folder=str(folder),
        is_apart=True,
    )
    link = Link(transport=config.transport, run_folder=str(folder), engine=0, engine_rank=0)
    engine = load_engine(spec, link)
    weights = CheckpointReader(folder)
    bucket = [(name, weights.read(name)) for name in weights.names()]
    sync_one([bucket], link.open_sender(), engine, version=0)
    sampling = SamplingParams(temperature=1.0, top_p=1.0, top_k=-1, max_tokens=1, seed=_SEED)
    prompt = np.array(TOKENS, np.int32)
    engine.add(0, GenerationRequest(prompt_token_ids=prompt, sampling=sampling))
    ended = engine.step()
    while not ended:
        ended = engine.step()
    ((_, result),) = ended
    (drawn,) = result.token_ids.tolist()
    return {"token": drawn, "logprob": float(result.logprobs[0])}


def _write_model(folder: Path, dtype: str) -> None:
    """Write a Qwen3 of one layer with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.utils import logging

    from mcore_rl.dtypes import torch_dtype

    logging.disable_progress_bar()
    torch.manual_seed(_SEED)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,  # attention kernels want these
        intermediate_size=96,
        max_position_embeddings=64,
        initializer_range=0.2,  # so that probabilities differ
    )
    model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.to(torch_dtype(dtype))
    model.save_pretrained(folder)


PROBES: tuple[Callable[..., Values], ...] = (import_name, devices, all_reduce, forward, token)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the probe that the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("name", choices=[probe.__name__ for probe in PROBES])
    parser.add_argument("args", nargs="*")
    arguments = parser.parse_args(argv)
    die_with_parent(arguments.parent)
    quiet_libraries()
    (probe,) = (probe for probe in PROBES if probe.__name__ == arguments.name)
    try:
        values = probe(arguments.folder, *arguments.args)
    except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
        traceback.print_exc()
        sys.stderr.write(f"{_reason(error)}\n")
        sys.stderr.flush()
        os._exit(1)  # threads of a library may wait for ever
    (arguments.folder / ANSWER_FILE).write_text(json.dumps(values), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


def _reason(error: BaseException) -> str:
    """Return one line on an error: of what caused it, which libraries wrap, the first line, below
    which torch puts its own stack."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    main()
