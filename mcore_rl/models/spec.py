"""Model families: what a Hugging Face `config.json` means in Megatron-Core.

A `ModelFamily` is registered under the `model_type` of `config.json`. It says which parameters
there are (`entries`), which arguments describe the architecture to Megatron (`transformer_kwargs`,
`gpt_kwargs`), and what it cannot express (`check`). Loading, export, weight sync and offline
conversion all read the same entries. A new family is one file and one import line in `__init__`.

Invariants: a family handed out by `model_family` has passed `check` for that configuration;
entries come in layer order (embedding, layer 0, 1, ..., final norm, output layer), which an engine
that reloads layer by layer relies on; every Hugging Face tensor belongs to exactly one entry.

Nothing here chooses numerics, fusions or parallel sizes: those belong to whoever builds the model.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from mcore_rl.errors import UserError, require
from mcore_rl.foreign_json import parse_json
from mcore_rl.model_files import CONFIG_FILE
from mcore_rl.models.mappings import (
    HfTensor,
    ParamEntry,
    Replicated,
    Vocab,
    padded_vocab_size,
)
from mcore_rl.models.safetensors_io import CheckpointReader, check_checkpoint
from mcore_rl.registry import Registry
from mcore_rl.types import Routing

QkNorm = Literal["none", "head", "whole"]
"""What an RMSNorm between the query and key projections and rotation normalizes: nothing, each head
of a token by itself, or all heads of the token together."""

_EMBEDDING, _OUTPUT_LAYER = "model.embed_tokens.weight", "lm_head.weight"
"""Names in Hugging Face checkpoints."""

_ROWS_AT_ONCE = 4096


class ModelFamily(ABC):
    """Everything that is particular to one `model_type`. Stateless."""

    config_class: ClassVar[type[PreTrainedConfig] | None] = None
    """Reads config.json where transformers does not know the `model_type`: an alias. The
    configuration is then of the type of this class."""

    @abstractmethod
    def check(self, config: PreTrainedConfig) -> None:
        """Raise a UserError naming field and value of what the family cannot express."""

    @abstractmethod
    def transformer_kwargs(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the arguments of Megatron's TransformerConfig that describe the architecture."""

    @abstractmethod
    def layer_entries(self, config: PreTrainedConfig, layer: int) -> list[ParamEntry]:
        """Return the parameters of decoder layer `layer`, counted from 0."""

    def gpt_kwargs(
        self, config: PreTrainedConfig, tp_size: int, vocab_divisible_by: int = 1
    ) -> dict[str, Any]:
        """Return the arguments of Megatron's GPTModel that describe embeddings and positions.

        Here those of the embeddings; a family adds its positions.

        `vocab_size` is the padded one; it matches `entries` with the same `vocab_divisible_by`.
        """
        return {
            "vocab_size": padded_vocab_size(config.vocab_size, tp_size, vocab_divisible_by),
            "max_sequence_length": config.max_position_embeddings,
            "share_embeddings_and_output_weights": config.tie_word_embeddings,
        }

    def qk_norm(self, config: PreTrainedConfig) -> QkNorm:
        """Return which norm queries and keys have beside what `transformer_kwargs` says."""
        return "none"

    def problem_of_tp(self, config: PreTrainedConfig, size: int) -> str:
        """Return why tensor parallelism of that size cannot be, beside what holds for all families:
        "is more than num_key_value_heads=2"; "" if it can."""
        return ""

    def engine_overrides(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the fields that vLLM has to be told although they are not in every config.json,
        since it does not take for them what the family does."""
        return {}

    def unused_prefixes(self, config: PreTrainedConfig) -> tuple[str, ...]:
        """Return how the names of tensors begin that a checkpoint may hold and no parameter is
        made of: layers for multi-token prediction. Exports do not have them."""
        return ()

    def entries(self, config: PreTrainedConfig, vocab_divisible_by: int = 1) -> list[ParamEntry]:
        """Return every parameter of the full model, in layer order.

        Tied embeddings have no entry for the output layer: its weight is the embedding's, also
        where Megatron keeps a copy of it on the last pipeline stage.
        """
        vocab_shape = (config.vocab_size, config.hidden_size)
        embedding = ParamEntry(
            megatron_name="embedding.word_embeddings.weight",
            mapping=Vocab(HfTensor(_EMBEDDING, vocab_shape), vocab_divisible_by),
        )
        final_norm = ParamEntry(
            megatron_name="decoder.final_layernorm.weight",
            mapping=Replicated(HfTensor("model.norm.weight", (config.hidden_size,))),
        )
        output_layer = ParamEntry(
            megatron_name="output_layer.weight",
            mapping=Vocab(HfTensor(_OUTPUT_LAYER, vocab_shape), vocab_divisible_by),
        )
        return [
            embedding,
            *(
                entry
                for layer in range(config.num_hidden_layers)
                for entry in self.layer_entries(config, layer)
            ),
            final_norm,
            *([] if config.tie_word_embeddings else [output_layer]),
        ]


MODEL_FAMILIES: Registry[ModelFamily] = Registry("model family", f"{CONFIG_FILE}: model_type")


MISSING = {
    "gpt_oss": "rows of packed sequences have no attention sinks and sliding windows yet, and "
    "mappings no expert tensors that are stacked, transposed and interleaved",
}
"""What stands against families that are often asked for, by model_type."""


def require_field(condition: bool, field: str, value: object, rule: str) -> None:
    """Raise a UserError about a field of config.json unless `condition` holds."""
    require(condition, f"{CONFIG_FILE}: {field}", value, rule)


def model_family(config: PreTrainedConfig) -> ModelFamily:
    """Return the family of `config`.

    Raises:
        UserError: if no family has this `model_type`, or the family cannot express `config`.
    """
    family = _family_called(config.model_type)
    quantization = getattr(config, "quantization_config", None)
    require_field(
        not quantization,
        "quantization_config",
        (quantization or {}).get("quant_method"),
        "is not supported: give a checkpoint whose weights are in bfloat16 or float32",
    )
    family.check(config)
    return family


def routing(config: PreTrainedConfig) -> Routing | None:
    """Return the experts of the model; None if it has none."""
    arch = model_family(config).transformer_kwargs(config)
    layers = [layer for layer, is_moe in enumerate(arch.get("moe_layer_freq", ())) if is_moe]
    if not layers:
        return None
    return Routing(layers=layers, num_experts=arch["num_moe_experts"], topk=arch["moe_router_topk"])


def load_hf_config(folder: str | Path, key: str = "model.path") -> PreTrainedConfig:
    """Return the configuration in `folder`, with the defaults that transformers fills in.

    Args:
        folder: a Hugging Face folder.
        key: by which the user named it, for messages.

    Raises:
        UserError: if the folder, its config.json or a family for it is missing, or if the
            configuration cannot be read or expressed.
    """
    folder = Path(folder)
    require(
        os.path.isdir(folder), key, str(folder), "is not a folder", "Give a downloaded checkpoint."
    )
    file = folder / CONFIG_FILE
    require(file.is_file(), key, str(folder), f"has no {CONFIG_FILE}")
    try:
        model_type = parse_json(file.read_bytes())["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not the configuration of a model: {error!r}.") from error
    config_class = _family_called(model_type).config_class
    try:
        if config_class is None:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        else:  # transformers knows what it is under another name
            values, _ = config_class.get_config_dict(folder)
            config = config_class.from_dict(values | {"model_type": config_class.model_type})
    # KeyError: `rope_scaling` lacks a number of its type.
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is refused by transformers: {reason}") from error
    if _has_own_original_length(config):
        # transformers reads the field when it builds the model, and fills the numbers of the
        # scaling without it when it reads the file.
        config.standardize_rope_params()
    model_family(config)
    return config


def engine_overrides(folder: str | Path) -> dict[str, Any]:
    """Return what an engine has to be told of the model in `folder` beside its config.json."""
    config = load_hf_config(folder)
    overrides = model_family(config).engine_overrides(config)
    if _has_own_original_length(config):  # which vLLM does not look for
        overrides["rope_parameters"] = dict(config.rope_parameters)
    return overrides


def _has_own_original_length(config: PreTrainedConfig) -> bool:
    """Whether `original_max_position_embeddings` stands beside the numbers of the scaling."""
    return hasattr(config, "original_max_position_embeddings")


def check_weights(folder: str | Path, config: PreTrainedConfig) -> None:
    """Raise a UserError unless the folder holds the weights that its configuration asks for.

    Where the embeddings are tied and the files hold an output layer too, the values of both are
    read: transformers unties the two if they differ, and here the output layer would be lost.
    """
    family, reader = model_family(config), CheckpointReader(folder)
    check_checkpoint(reader, family.entries(config), family.unused_prefixes(config))
    if config.tie_word_embeddings and _OUTPUT_LAYER in reader.names():
        require(
            _are_equal(reader, _OUTPUT_LAYER, _EMBEDDING),
            f"{Path(folder) / CONFIG_FILE}: tie_word_embeddings",
            True,
            f"would lose {_OUTPUT_LAYER}, which differs from {_EMBEDDING}",
            "Set tie_word_embeddings=false there.",
        )


def _are_equal(reader: CheckpointReader, one: str, other: str) -> bool:
    """Return whether two matrices hold the same numbers; a few rows are in memory at a time."""
    shape = reader.shape(one)
    return shape == reader.shape(other) and all(
        bool((reader.read(one, rows) == reader.read(other, rows)).all())
        for rows in pairwise([*range(0, shape[0], _ROWS_AT_ONCE), shape[0]])
    )


def _family_called(model_type: str) -> ModelFamily:
    reason = MISSING.get(model_type)
    require_field(reason is None, "model_type", model_type, f"is not supported: {reason}")
    # Nobody types this name, so none that looks like it is meant.
    rule = f"is none of the supported families: {', '.join(MODEL_FAMILIES.names())}"
    require_field(model_type in MODEL_FAMILIES, "model_type", model_type, rule)
    return MODEL_FAMILIES.get(model_type)
