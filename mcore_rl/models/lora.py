"""LoRA in terms of the mapping list: which layers are adapted, and what their adapters are called.

A layer with weight W [out, in] gets A [r, in] and B [out, r] and computes

    W x + alpha / r * B (A x)        Hu et al. 2021, arXiv:2106.09685

Adapters have entries like any parameter, made from those of W: B is cut and put together as W's
rows are, A as W's columns. So what Megatron fuses (query, key and value; gate and up) shares one A,
while each Hugging Face layer has rows of B of its own. Routers, embeddings, the output layer and
norms are not adapted.

A folder of adapters has PEFT's format; its layers are those of checkpoint files, so an expert's are
`mlp.experts.3.gate_proj` (see `decoder.py`). Nothing here knows of process groups or of training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import Tensor

from mcore_rl.durable_files import sync
from mcore_rl.errors import require, require_one_of
from mcore_rl.models.mappings import HfTensor, ParamEntry, ParamMapping, Replicated, Row
from mcore_rl.models.safetensors_io import write_tensors

_LINEAR_WEIGHT = re.compile(r"\.linear_\w+\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The adapter of one of Megatron's linear layers."""

    weight: ParamEntry
    """W; its name is the adapter's identity."""
    a: ParamEntry
    b: ParamEntry


def linear_weights(entries: Iterable[ParamEntry]) -> list[ParamEntry]:
    """Return the weights of the layers that can be adapted."""
    return [entry for entry in entries if _LINEAR_WEIGHT.search(entry.megatron_name)]


def is_adapter(megatron_name: str) -> bool:
    """Whether a parameter, or what a checkpoint has under its name, is half an adapter."""
    return ".adapter.lora_" in megatron_name


def chosen_weights(
    weights: Sequence[ParamEntry], target_modules: Sequence[str]
) -> list[ParamEntry]:
    """Return those of the `linear_weights` whose layers go by the given names.

    Args:
        weights: of the whole model.
        target_modules: last parts of Hugging Face's names: "q_proj".

    Raises:
        UserError: for a name that the model has not, or a part of what Megatron fuses.
    """
    chosen = set(target_modules)
    known = sorted({name for weight in weights for name in _layer_names(weight)})
    for name in target_modules:
        require_one_of("model.target_modules", name, known)
    found = [weight for weight in weights if not chosen.isdisjoint(_layer_names(weight))]
    for weight in found:
        fused = _layer_names(weight)
        require(
            fused <= chosen,
            "model.target_modules",
            list(target_modules),
            f"leaves out a part of {', '.join(sorted(fused))}, which Megatron computes as one",
            "Name all of them.",
        )
    return found


def adapter_of(weight: ParamEntry, rank: int) -> Adapter:
    """Return the adapter of a linear layer; its halves are cut where the weight is."""
    mapping = weight.mapping
    first = mapping.sources[0]
    whole_a = HfTensor(f"{_layer(first)}.lora_A.weight", (rank, first.shape[1]))
    if isinstance(mapping, Row):
        a, b = Row(whole_a), Replicated(_tensor_of_b(first, rank))
    else:
        a, b = Replicated(whole_a), _with_sources(mapping, lambda hf: _tensor_of_b(hf, rank))
    module = weight.megatron_name.removesuffix("weight")
    return Adapter(
        weight=weight,
        a=replace(weight, megatron_name=f"{module}adapter.lora_A", mapping=a),
        b=replace(weight, megatron_name=f"{module}adapter.lora_B", mapping=b),
    )


def peft_tensors(adapters: Iterable[Adapter], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return PEFT's tensors by PEFT's names.

    Args:
        adapters: all of the model.
        found: full tensors of their entries by Hugging Face name.
    """
    tensors = {}
    for adapter in adapters:
        (a,) = adapter.a.mapping.sources
        for hf in adapter.weight.mapping.sources:
            layer = f"base_model.model.{_layer(hf)}"
            tensors[f"{layer}.lora_A.weight"] = found[a.name].clone()  # no two may share memory
            tensors[f"{layer}.lora_B.weight"] = found[_tensor_of_b(hf, 0).name]
    return tensors


def write_peft_adapter(
    folder: Path,
    adapters: Sequence[Adapter],
    found: Mapping[str, Tensor],
    *,
    base: str,
    rank: int,
    alpha: int,
) -> None:
    """Write a folder that `PeftModel.from_pretrained` and vLLM's LoRA requests read.

    Args:
        folder: made here.
        adapters: all of the model.
        found: full tensors of their entries by Hugging Face name, on any device.
        base: path or name of the model that was adapted.
        rank: r.
        alpha: the product is scaled by alpha / r.
    """
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({name for one in adapters for name in _layer_names(one.weight)}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        name: tensor.cpu().contiguous() for name, tensor in peft_tensors(adapters, found).items()
    }
    write_tensors(weights_file, tensors)
    for path in (config_file, folder):
        sync(path)


def _with_sources(mapping: ParamMapping, of: Callable[[HfTensor], HfTensor]) -> ParamMapping:
    """Return a mapping of other tensors, put together in the same way."""
    values = {field.name: getattr(mapping, field.name) for field in fields(mapping)}  # type: ignore
    return replace(
        mapping,  # type: ignore
        **{name: of(hf) for name, hf in values.items() if isinstance(hf, HfTensor)},
    )


def _tensor_of_b(hf: HfTensor, rank: int) -> HfTensor:
    return HfTensor(f"{_layer(hf)}.lora_B.weight", (hf.shape[0], rank))


def _layer_names(weight: ParamEntry) -> set[str]:
    """Return the last parts of the layers' names: {"gate_proj", "up_proj"}."""
    return {_layer(hf).rpartition(".")[2] for hf in weight.mapping.sources}


def _layer(hf: HfTensor) -> str:
    return hf.name.removesuffix(".weight")
