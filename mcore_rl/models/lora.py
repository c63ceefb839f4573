"""LoRA in terms of the mapping list: which layers are adapted, and what their adapters are called.

A layer with weight W [out, in] gets A [r, in] and B [out, r] and computes

    W x + alpha / r * B (A x)        Hu et al. 2021, arXiv:2106.09685

Adapters have entries like any parameter, made from those of W: B is cut and put together as W's
rows are, A as W's columns. So what Megatron fuses (query, key and value; gate and up) shares one A,
while each Hugging Face layer has rows of B of its own; of fused layers some may be left
as they are. Routers, embeddings, the output layer and
norms are not adapted.

A folder of adapters has PEFT's format; its layers are those of checkpoint files, so an expert's are
`mlp.experts.3.gate_proj` (see `decoder.py`). Nothing here knows of process groups or of training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from mcore_rl.durable_files import sync
from mcore_rl.errors import require_one_of
from mcore_rl.models.mappings import (
    HfTensor,
    ParamEntry,
    ParamMapping,
    Range,
    Replicated,
    Row,
    hf_shapes,
    take,
    to_megatron,
)
from mcore_rl.models.safetensors_io import write_tensors

_LINEAR_WEIGHT = re.compile(r"\.linear_\w+\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The adapter of one of Megatron's linear layers."""

    weight: ParamEntry
    """W; its name is the adapter's identity."""
    a: ParamEntry
    b: ParamEntry
    adapted: tuple[HfTensor, ...]
    """Hugging Face's layers in W that are adapted; rows of B of the others count as 0."""


def linear_weights(entries: Iterable[ParamEntry]) -> list[ParamEntry]:
    """Return the weights of the layers that can be adapted."""
    return [entry for entry in entries if _LINEAR_WEIGHT.search(entry.megatron_name)]


def is_adapter(megatron_name: str) -> bool:
    """Whether a parameter, or what a checkpoint has under its name, is half an adapter."""
    return ".adapter.lora_" in megatron_name


def chosen_weights(
    weights: Sequence[ParamEntry], target_modules: Sequence[str]
) -> list[ParamEntry]:
    """Return those of the `linear_weights` of which a layer goes by one of the given names.

    Args:
        weights: of the whole model.
        target_modules: last parts of Hugging Face's names, as PEFT takes them: "q_proj". They may
            be a part of what Megatron fuses; `adapter_of` has the rest stay as it is.

    Raises:
        UserError: for a name that the model has not.
    """
    chosen = set(target_modules)
    known = sorted({name for weight in weights for name in _layer_names(weight)})
    for name in target_modules:
        require_one_of("model.target_modules", name, known)
    return [weight for weight in weights if not chosen.isdisjoint(_layer_names(weight))]


def adapters_of(
    weights: Sequence[ParamEntry], rank: int, target_modules: Sequence[str] | None
) -> list[Adapter]:
    """Return the adapters of those of the `linear_weights` that go by the given names.

    Args:
        weights: of the whole model.
        rank: r.
        target_modules: as in `chosen_weights`; None: all.
    """
    if target_modules is None:
        return [adapter_of(weight, rank) for weight in weights]
    chosen = chosen_weights(weights, target_modules)
    return [adapter_of(weight, rank, target_modules) for weight in chosen]


def number_of(text: str) -> int:
    """Return a number of 63 bits that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def digest_of(name: str, tensor: Tensor) -> Tensor:
    """Return the part of a parameter, or of a shard of it, in the digest of a base: the sum of the
    bits of its numbers, weighted by its name, [] int64. Sums of parts wrap; padding adds 0."""
    bits = tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    return bits.sum(dtype=torch.int64) * (number_of(name) | 1)


def adapter_of(
    weight: ParamEntry, rank: int, target_modules: Sequence[str] | None = None
) -> Adapter:
    """Return the adapter of a linear layer; its halves are cut where the weight is.

    Args:
        weight: one of `linear_weights`.
        rank: r.
        target_modules: the names of the layers that are adapted, as in `chosen_weights`; None: all
            that the weight is made of.
    """
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
        adapted=tuple(
            hf
            for hf in mapping.sources
            if target_modules is None or _layer_name(hf) in target_modules
        ),
    )


def adapted_rows(adapter: Adapter, tp_rank: int, tp_size: int) -> Tensor | None:
    """Return 1 for each row of a shard of B that is of an adapted layer and 0 for the others,
    [rows, 1] float32; None where all are."""
    if adapter.adapted == adapter.weight.mapping.sources:
        return None
    names = {_tensor_of_b(hf, 0).name for hf in adapter.adapted}
    shapes = hf_shapes(adapter.b)

    def read(name: str, rows: Range, cols: Range | None) -> Tensor:
        return take(torch.full(shapes[name], float(name in names)), rows, cols)[:, :1]

    return to_megatron(adapter.b, tp_rank, tp_size, read)


def peft_tensors(adapters: Iterable[Adapter], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return PEFT's tensors by PEFT's names.

    Args:
        adapters: all of the model.
        found: full tensors of their entries by Hugging Face name.
    """
    return {
        name: found[own].clone()  # no two may share memory
        for own, names in peft_names(adapters).items()
        for name in names
    }


def peft_names(adapters: Iterable[Adapter]) -> dict[str, list[str]]:
    """Return PEFT's names of each full tensor of the adapters' entries, by Hugging Face name: of an
    A one for each adapted layer that shares it, of the B of a layer that is not adapted none."""
    names: dict[str, list[str]] = {}
    for adapter in adapters:
        (a,) = adapter.a.mapping.sources
        for hf in adapter.adapted:
            layer = f"base_model.model.{_layer(hf)}"
            names.setdefault(a.name, []).append(f"{layer}.lora_A.weight")
            names[_tensor_of_b(hf, 0).name] = [f"{layer}.lora_B.weight"]
    return names


def adapted_layers(adapters: Iterable[Adapter]) -> list[str]:
    """Return the last parts of the names of the layers that are adapted: ["q_proj", "v_proj"]."""
    return sorted({_layer_name(hf) for one in adapters for hf in one.adapted})


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
        "target_modules": adapted_layers(adapters),
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
    return {_layer_name(hf) for hf in weight.mapping.sources}


def _layer_name(hf: HfTensor) -> str:
    return _layer(hf).rpartition(".")[2]


def _layer(hf: HfTensor) -> str:
    return hf.name.removesuffix(".weight")
