"""Under which key, and where in that key's tensor, Megatron's checkpoints hold each parameter.

    "decoder.layers.3.mlp.linear_fc2.weight"       a dense model: row 3 of the tensor of all layers
        -> decoder.layers.mlp.linear_fc2.weight           [3, :, :] of [layers, H, F]
    "decoder.layers.3.mlp.experts.local_experts.7.linear_fc2.weight"
        -> decoder.layers.3.mlp.experts.experts.linear_fc2.weight   [7, :, :] of [experts, H, F]

That is what `sharded_state_dict` of Megatron's GPTModel gives with the metadata of
`megatron/checkpoint.py`; a test compares the two for every family. Only models whose layers are
alike stack them; a list in `moe_layer_freq`, which every family with experts sets, says they are
not (TransformerBlock.sharded_state_dict in megatron/core/transformer/transformer_block.py).

Norms have Transformer Engine's names, under the linear layer that it fuses them with, as
`sharded_state_dict_keys_map` in `megatron/block_spec.py` has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from mcore_rl.models.mappings import ParamEntry, Shape, Vocab
from mcore_rl.models.spec import model_family

_FUSED_WITH = {
    "input_layernorm": "self_attention.linear_qkv",
    "self_attention.q_layernorm": "self_attention.linear_q_up_proj",
    "self_attention.kv_layernorm": "self_attention.linear_kv_up_proj",
    "pre_mlp_layernorm": "mlp.linear_fc1",
}
"""Norm -> the linear layer that its name moves to, in layers that have that linear layer."""

_LAYER = re.compile(r"^decoder\.layers\.\d+\.")
_EXPERT = re.compile(r"\.local_experts\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredParam:
    """One parameter of the model as a part of one tensor of the checkpoint."""

    entry: ParamEntry
    key: str
    """"decoder.layers.mlp.linear_fc1.weight"."""
    place: tuple[int, ...]
    """Its index along the leading dimensions that stack layers or experts; () where nothing is."""
    num_places: Shape
    """Sizes of those dimensions."""
    shape: Shape
    """Of the parameter in one piece, without padding."""

    @property
    def stacked_shape(self) -> Shape:
        """Shape of the tensor of the checkpoint, unless a vocabulary is padded there."""
        return (*self.num_places, *self.shape)

    @property
    def row_numel(self) -> int:
        """Numbers in one row."""
        return math.prod(self.shape[1:])

    @property
    def extra_state_key(self) -> str | None:
        """Key of the empty object that Megatron saves beside the weight of a parallel linear layer;
        None for other parameters."""
        module, _, kind = self.key.rpartition(".")
        mapping = self.entry.mapping
        if kind != "weight" or mapping.is_replicated or isinstance(mapping, Vocab):
            return None
        if len(self.shape) == 1:  # of a norm that is cut
            return None
        index, count = (*self.place, 0)[0], (*self.num_places, 1)[0]
        return f"{module}._extra_state/shard_{index}_{count}"

    def dtype(self, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
        """Return the dtype to convert to: `wanted`, or `stored` where nothing is wanted.

        Biases of routers stay as they are: Megatron and transformers keep them in float32 in a
        model of any dtype.
        """
        is_buffer = self.key.endswith(".expert_bias")
        return stored if wanted is None or is_buffer else wanted


def stored_params(config: PreTrainedConfig) -> list[StoredParam]:
    """Return every parameter of the model, in layer order."""
    family = model_family(config)
    entries = family.entries(config)
    arch = family.transformer_kwargs(config)
    stacks_layers = not isinstance(arch.get("moe_layer_freq"), list)
    names = {entry.megatron_name for entry in entries}
    return [
        _stored(entry, names, arch["num_layers"] if stacks_layers else None, arch)
        for entry in entries
    ]


def _stored(
    entry: ParamEntry, names: Iterable[str], num_layers: int | None, arch: dict
) -> StoredParam:
    key, place, num_places = _fused_name(entry.megatron_name, names), (), ()
    if entry.layer is not None and num_layers is not None:
        key = _LAYER.sub("decoder.layers.", key)
        place, num_places = (entry.layer,), (num_layers,)
    if entry.expert is not None:
        key = _EXPERT.sub(".experts.", key)
        place, num_places = (*place, entry.expert), (*num_places, arch["num_moe_experts"])
    num_rows = sum(block.num_rows for block in entry.mapping.blocks(0, 1))
    return StoredParam(
        entry=entry,
        key=key,
        place=place,
        num_places=num_places,
        shape=(num_rows, *entry.mapping.sources[0].shape[1:]),
    )


def _fused_name(name: str, names: Iterable[str]) -> str:
    layer = _LAYER.match(name)
    if not layer:
        return name
    norm, _, kind = name[layer.end() :].rpartition(".")
    linear = f"{layer[0]}{_FUSED_WITH.get(norm)}"
    return f"{linear}.layer_norm_{kind}" if f"{linear}.weight" in names else name
