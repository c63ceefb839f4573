"""How many parameters each pipeline stage puts on a rank.

Counted from the entries that loading and export use (`models/mappings.py`), so the count is that of
the model that would be built. All ranks of a stage hold as many: every axis divides evenly.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from mcore_rl.megatron.config import LoraConfig
from mcore_rl.models.layout import layers_of_stages
from mcore_rl.models.lora import adapters_of, linear_weights
from mcore_rl.models.mappings import ParamEntry
from mcore_rl.models.spec import model_family
from mcore_rl.types import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParameters:
    """Elements that one rank of a pipeline stage holds."""

    layers: tuple[int, ...]
    """Decoder layers of the stage, from 0."""
    dense: int
    """Trained, with a copy on every data-parallel (and context-parallel) rank."""
    experts: int
    """Trained, with a copy on every expert-data-parallel rank."""
    frozen: int
    """Without gradient: all but the adapters of LoRA; frozen routers; routers' biases."""

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.frozen


def model_size(config: PreTrainedConfig) -> int:
    """Return the elements of the whole model, as Hugging Face counts them."""
    entries = model_family(config).entries(config)
    return sum(math.prod(hf.shape) for entry in entries for hf in entry.mapping.sources)


def stage_parameters(
    config: PreTrainedConfig,
    layout: Layout,
    *,
    routers_are_frozen: bool = False,
    lora: LoraConfig | None = None,
    has_output_layer: bool = True,
) -> list[StageParameters]:
    """Return what a rank of each pipeline stage holds, first stage first.

    Args:
        config: of a supported family.
        layout: divides the model (`models.layout.check_layout`).
        routers_are_frozen: `actor.megatron.moe_router_freeze`.
        lora: adapters, which then train alone; None: there are none.
        has_output_layer: False for a critic, whose head is a row of numbers that is not counted.
    """
    entries = model_family(config).entries(config)
    if not has_output_layer:
        entries = [entry for entry in entries if entry.megatron_name != "output_layer.weight"]
    trained = _adapters(entries, lora) if lora else _trained(entries, routers_are_frozen)
    names = {entry.megatron_name for entry in trained}
    frozen = [entry for entry in entries if entry.megatron_name not in names]

    stages = []
    for stage, layers in enumerate(stage_layers(config.num_hidden_layers, layout)):
        on_stage = functools.partial(
            _elements_on, stage=stage, layers=layers, config=config, layout=layout
        )
        stages.append(
            StageParameters(
                layers=layers,
                dense=on_stage(entry for entry in trained if not entry.is_expert),
                experts=on_stage(entry for entry in trained if entry.is_expert),
                frozen=on_stage(frozen),
            )
        )
    return stages


def stage_layers(num_layers: int, layout: Layout) -> list[tuple[int, ...]]:
    """Return the decoder layers of each pipeline stage, those of its virtual stages together."""
    ends = list(itertools.accumulate(layers_of_stages(num_layers, layout)))
    chunks = [range(start, end) for start, end in itertools.pairwise([0, *ends])]
    return [
        tuple(layer for chunk in chunks[stage :: layout.pp] for layer in chunk)
        for stage in range(layout.pp)
    ]


def _adapters(entries: Sequence[ParamEntry], lora: LoraConfig) -> list[ParamEntry]:
    adapters = adapters_of(linear_weights(entries), lora.rank, lora.names)
    return [entry for adapter in adapters for entry in (adapter.a, adapter.b)]


def _trained(entries: Sequence[ParamEntry], routers_are_frozen: bool) -> list[ParamEntry]:
    # A router's bias is a buffer.
    frozen = (".expert_bias", ".router.weight") if routers_are_frozen else (".expert_bias",)
    return [entry for entry in entries if not entry.megatron_name.endswith(frozen)]


def _elements_on(
    entries: Iterable[ParamEntry],
    *,
    stage: int,
    layers: tuple[int, ...],
    config: PreTrainedConfig,
    layout: Layout,
) -> int:
    """Return the elements of the entries that one rank of a stage holds, padding included."""
    held = [entry for entry in entries if _is_on(entry, stage, layers, config, layout)]
    experts = sum(_shard_elements(entry, layout.etp) for entry in held if entry.is_expert)
    dense = sum(_shard_elements(entry, layout.tp) for entry in held if not entry.is_expert)
    return dense + experts // layout.ep


def _is_on(
    entry: ParamEntry,
    stage: int,
    layers: tuple[int, ...],
    config: PreTrainedConfig,
    layout: Layout,
) -> bool:
    if entry.layer is not None:
        return entry.layer in layers
    is_first, is_last = stage == 0, stage == layout.pp - 1
    if entry.megatron_name.startswith("embedding."):
        return is_first or (is_last and config.tie_word_embeddings)  # the last keeps a copy
    return is_last


def _shard_elements(entry: ParamEntry, num_shards: int) -> int:
    columns = {hf.name: math.prod(hf.shape[1:]) for hf in entry.mapping.sources}
    return sum(
        (block.num_rows + block.num_pad_rows)
        * (block.cols[1] - block.cols[0] if block.cols else columns[block.hf_name])
        for block in entry.mapping.blocks(0, num_shards)
    )
