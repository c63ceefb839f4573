"""What the processes of `processes.py` do with a converted checkpoint."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mcore_rl.config.run import train_layout
from mcore_rl.errors import UserError
from mcore_rl.megatron.config import MegatronConfig
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import load_hf_config, model_family


def built(model_folder, megatron):
    """Return (chunks, parallel) of an unloaded model in the layout of these processes."""
    from mcore_rl.megatron import cpu, parallel
    from mcore_rl.megatron.model import build_chunks, build_transformer_config

    cpu.install()
    cfg = MegatronConfig(dtype="float32", **megatron)
    groups = parallel.initialize(train_layout(cfg, dist.get_world_size()), seed=0)
    config = load_hf_config(model_folder)
    chunks = build_chunks(config, build_transformer_config(config, cfg, groups), groups, 1.0)
    return chunks, groups


def sharded_tensors(chunk, groups):
    """Return what Megatron would save for a model: tensors and objects by key."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories

    state = chunk.sharded_state_dict(
        metadata={"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
    )
    assert any(isinstance(value, ShardedTensorFactory) for value in state.values())
    apply_factories(state)
    pending, tensors, objects = list(state.values()), {}, set()
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
        elif hasattr(value, "global_shape") and hasattr(value, "dtype"):
            tensors[value.key] = tuple(value.global_shape), value.dtype
        else:
            objects.add(value.unique_key)
    return tensors, objects


def what_megatron_saves(model_folders):
    """Return, for each model, keys, shapes and dtypes of its tensors and keys of its objects."""
    found = []
    for folder in model_folders:
        from mcore_rl.megatron import parallel

        chunks, groups = built(folder, {})
        found.append(sharded_tensors(chunks[0], groups))
        parallel.shut_down()
    return found


def names_loaded_wrongly(hf_folder, mcore_folder, megatron):
    """Load the converted checkpoint into this layout by `load_model`; return the parameters that
    differ from those loaded from the Hugging Face folder, and how many there are."""
    from mcore_rl.megatron import parallel
    from mcore_rl.megatron.checkpoint import load_model
    from mcore_rl.megatron.model import load_weights, named_local_parameters

    chunks, groups = built(hf_folder, megatron)
    params = named_local_parameters(chunks, groups)
    with torch.no_grad():
        for param in params.values():
            param.fill_(float("nan"))
    load_model(Path(mcore_folder), chunks, groups)
    found = {name: param.detach().clone() for name, param in params.items()}
    config = load_hf_config(hf_folder)
    entries = model_family(config).entries(config)
    load_weights(params, entries, CheckpointReader(hf_folder), groups)
    wrong = [name for name, param in params.items() if not torch.equal(found[name], param)]
    parallel.shut_down()
    return wrong, len(found)


def failure_to_load(hf_folder, mcore_folder):
    """Return the error of `load_model`."""
    from mcore_rl.megatron import parallel
    from mcore_rl.megatron.checkpoint import load_model

    chunks, groups = built(hf_folder, {})
    try:
        load_model(Path(mcore_folder), chunks, groups)
    except UserError as error:
        return str(error)
    finally:
        parallel.shut_down()


def load_all_of_it(hf_folder, mcore_folder):
    """Load the checkpoint by Megatron alone, with every key it would save, and return the names
    that it does not fill or that the model does not know."""
    from megatron.core import dist_checkpointing

    from mcore_rl.megatron import parallel

    chunks, groups = built(hf_folder, {})
    state = chunks[0].sharded_state_dict(
        metadata={"singleton_local_shards": False, "dp_cp_group": groups.dp_cp}
    )
    loaded: Any = dist_checkpointing.load({"model": state}, str(mcore_folder), strict="raise_all")
    result = chunks[0].load_state_dict(loaded["model"], strict=True)
    parallel.shut_down()
    return list(result.missing_keys), list(result.unexpected_keys)
