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

EMBEDDING, END = "embedding", "end"
"""Parts of a model outside its layers; the end is the final norm with the output layer."""


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
    return num_elements(model_family(config).entries(config))


def num_elements(entries: Iterable[ParamEntry]) -> int:
    """Return the elements of the Hugging Face tensors of entries."""
    return sum(math.prod(hf.shape) for entry in entries for hf in entry.mapping.sources)


def stage_parameters(
    config: PreTrainedConfig,
    layout: Layout,
    *,
    routers_are_frozen: bool = False,
    lora: LoraConfig | None = None,
    has_output_layer: bool = True,
) -> list[StageParameters]:
    """Return what a rank of each pipeline stage holds, first stage first; see `ParameterCounts`."""
    counts = ParameterCounts(
        config,
        routers_are_frozen=routers_are_frozen,
        lora=lora,
        has_output_layer=has_output_layer,
    )
    return counts.stages(layout)


class ParameterCounts:
    """The parameters of a model, counted once for all layouts.

    Args:
        config: of a supported family.
        routers_are_frozen: `actor.megatron.moe_router_freeze`.
        lora: adapters, which then train alone; None: there are none.
        has_output_layer: False for a critic, whose head is a row of numbers that is not counted.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        routers_are_frozen: bool = False,
        lora: LoraConfig | None = None,
        has_output_layer: bool = True,
    ) -> None:
        self._config = config
        entries = model_family(config).entries(config)
        if not has_output_layer:
            entries = [entry for entry in entries if entry.megatron_name != "output_layer.weight"]
        trained = _adapters(entries, lora) if lora else _trained(entries, routers_are_frozen)
        names = {entry.megatron_name for entry in trained}
        frozen = [entry for entry in entries if entry.megatron_name not in names]
        # By (has gradients, is an expert's): the entries, which `_sizes` counts.
        self._kinds = {
            (is_trained, is_expert): [entry for entry in every if entry.is_expert == is_expert]
            for is_trained, every in ((True, trained), (False, frozen))
            for is_expert in (False, True)
        }
        self._counted: dict[tuple[bool, bool, int], dict[int | str, int]] = {}

    def stages(self, layout: Layout) -> list[StageParameters]:
        """Return what a rank of each pipeline stage holds, first stage first.

        Args:
            layout: divides the model (`models.layout.check_layout`).
        """
        stages = []
        for stage, layers in enumerate(stage_layers(self._config.num_hidden_layers, layout)):
            places = [*layers, *self._outside_layers(stage, layout)]
            count = functools.partial(self._elements, places)
            stages.append(
                StageParameters(
                    layers=layers,
                    dense=count(True, False, layout.tp),
                    experts=count(True, True, layout.etp) // layout.ep,
                    frozen=count(False, False, layout.tp)
                    + count(False, True, layout.etp) // layout.ep,
                )
            )
        return stages

    def _elements(
        self, places: Iterable[int | str], is_trained: bool, is_expert: bool, num_shards: int
    ) -> int:
        """Return the elements of these places that one of so many shards holds, padding included;
        of experts those of all."""
        key = is_trained, is_expert, num_shards
        if key not in self._counted:
            sizes: dict[int | str, int] = {}
            for entry in self._kinds[is_trained, is_expert]:
                place = _place(entry)
                sizes[place] = sizes.get(place, 0) + _shard_elements(entry, num_shards)
            self._counted[key] = sizes
        return sum(self._counted[key].get(place, 0) for place in places)

    def _outside_layers(self, stage: int, layout: Layout) -> list[str]:
        is_first, is_last = stage == 0, stage == layout.pp - 1
        # Of tied embeddings the last stage keeps a copy.
        has_embedding = is_first or (is_last and self._config.tie_word_embeddings)
        return [*([EMBEDDING] if has_embedding else []), *([END] if is_last else [])]


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


def _place(entry: ParamEntry) -> int | str:
    """Return the layer of an entry, or what else of the model it belongs to."""
    if entry.layer is not None:
        return entry.layer
    return EMBEDDING if entry.megatron_name.startswith("embedding.") else END


def _shard_elements(entry: ParamEntry, num_shards: int) -> int:
    columns = {hf.name: math.prod(hf.shape[1:]) for hf in entry.mapping.sources}
    return sum(
        (block.num_rows + block.num_pad_rows)
        * (block.cols[1] - block.cols[0] if block.cols else columns[block.hf_name])
        for block in entry.mapping.blocks(0, num_shards)
    )
