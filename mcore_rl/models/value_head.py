"""The mapping of a critic: a language model whose output layer is a head of one row.

The head is `score.weight`, as in the token and sequence classifiers of transformers. A checkpoint
of a language model has none; the head then begins at 0, and with it every value.
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from mcore_rl.models.mappings import HfTensor, ParamEntry, Replicated
from mcore_rl.models.safetensors_io import CheckpointReader, check_checkpoint
from mcore_rl.models.spec import model_family

OUTPUT_LAYER = "output_layer.weight"
"""Megatron's name of the head."""
_HEAD = "score.weight"


def value_entries(config: PreTrainedConfig, reader: CheckpointReader) -> list[ParamEntry]:
    """Return every parameter of the critic that the checkpoint holds, in layer order."""
    body = [
        entry
        for entry in model_family(config).entries(config)
        if entry.megatron_name != OUTPUT_LAYER
    ]
    if _HEAD not in reader.names():
        return body
    head = Replicated(HfTensor(_HEAD, (1, config.hidden_size)))
    return [*body, ParamEntry(megatron_name=OUTPUT_LAYER, mapping=head)]


def check_value_weights(folder: str | Path, config: PreTrainedConfig) -> None:
    """Raise a UserError unless the folder holds the weights that a critic begins with."""
    reader = CheckpointReader(folder)
    unused = model_family(config).unused_prefixes(config)
    check_checkpoint(reader, value_entries(config, reader), unused)
