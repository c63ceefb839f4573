"""A LoRA checkpoint as a model: its base with the adapters merged, or only the adapters.

A run with LoRA saves no base: `identity` in its checkpoints says which adapters there are, and has
a digest of the weights that they adapt, which are read from `model.path` again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mcore_rl.dtypes import DTYPES, torch_dtype
from mcore_rl.errors import require
from mcore_rl.megatron.config import LoraConfig
from mcore_rl.models.lora import (
    Adapter,
    adapters_of,
    digest_of,
    is_adapter,
    linear_weights,
    write_peft_adapter,
)
from mcore_rl.models.mappings import HfTensor, ParamEntry, Shape, hf_shapes, to_hf, to_megatron
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import check_weights, model_family
from mcore_rl.torch_dist.parts import Part
from mcore_rl.torch_dist.source import TorchDistSource, read_common

"""Dtypes in which a run may have loaded its base."""


def holds_adapters(mcore: TorchDistSource) -> bool:
    """Whether a checkpoint is one of a run with LoRA."""
    return any(map(is_adapter, mcore.tensor_keys()))


class AdaptedModel:
    """The tensors of a base with the adapters of a checkpoint in them, made when asked for.

    Args:
        mcore: a checkpoint of adapters.
        base: Hugging Face folder of the model that they adapt.
        config: of the base.

    Raises:
        UserError: if the base is not the one that the adapters were trained on, or adapters are
            missing.
    """

    def __init__(self, mcore: TorchDistSource, base: Path, config: PreTrainedConfig) -> None:
        check_weights(base, config)
        self._mcore, self.base, self._reader = mcore, base, CheckpointReader(base)
        identity = read_common(mcore.folder)["identity"]
        self.lora = LoraConfig(
            rank=identity["model.lora_rank"],
            alpha=identity["model.lora_alpha"],
            target_modules=tuple(identity["model.target_modules"]),
        )
        self._entries = model_family(config).entries(config)
        self.adapters = adapters_of(linear_weights(self._entries), self.lora.rank, self.lora.names)
        for adapter in self.adapters:
            for half in (adapter.a, adapter.b):
                found, wanted = mcore.shape(half.megatron_name), _whole_shape(half)
                key = f"checkpoint {mcore.folder}: shape of {half.megatron_name}"
                require(found == wanted, key, found, f"is not {wanted}, as the base asks for")
        self._adapter_of = {hf.name: one for one in self.adapters for hf in one.adapted}
        require(
            identity["weights of model.path"] in self._digests(),
            "base",
            str(base),
            "has not the weights that the adapters were trained on",
            "Give their folder by --config-from.",
        )

    @cached_property
    def tensors(self) -> list[HfTensor]:
        """All tensors of the model, in layer order."""
        return [hf for entry in self._entries for hf in entry.mapping.sources]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor of the base."""
        return self._reader.dtype(name)

    def parts(self, name: str, dtype: torch.dtype) -> Iterator[Part]:
        """Yield a tensor, W + alpha / r * B A in float32 where it is adapted."""
        weight = self._reader.read(name)
        adapter = self._adapter_of.get(name)
        if adapter is not None:
            found = self._halves(adapter)
            (a,) = hf_shapes(adapter.a)
            # Named as the weight, however its A is shared.
            b = f"{name.removesuffix('.weight')}.lora_B.weight"
            product = found[b].float() @ found[a].float()
            weight = weight.float() + self.lora.scale * product
        yield weight.to(dtype).contiguous()

    def write_adapter(self, folder: Path) -> None:
        """Write the adapters as PEFT's folder."""
        found = {
            name: tensor for one in self.adapters for name, tensor in self._halves(one).items()
        }
        write_peft_adapter(
            folder,
            self.adapters,
            found,
            base=str(self.base),
            rank=self.lora.rank,
            alpha=self.lora.alpha,
        )

    def _halves(self, adapter: Adapter) -> dict[str, Tensor]:
        """Return both full halves by Hugging Face name."""
        return {
            name: tensor
            for half in (adapter.a, adapter.b)
            for name, tensor in to_hf(half, [self._whole(half)]).items()
        }

    def _whole(self, half: ParamEntry) -> Tensor:
        shape = _whole_shape(half)
        return self._mcore.read(half.megatron_name, (0,) * len(shape), shape)

    def _digests(self) -> set[str]:
        """Return the digest of the base in every dtype that a run may have had it in."""
        totals = dict.fromkeys(map(torch_dtype, DTYPES), torch.zeros((), dtype=torch.int64))
        for entry in self._entries:
            whole = to_megatron(entry, 0, 1, self._reader.read)
            for dtype in totals:
                is_buffer = entry.megatron_name.endswith(".expert_bias")
                cast = whole.to(torch.float32 if is_buffer else dtype)
                totals[dtype] = totals[dtype] + digest_of(entry.megatron_name, cast)
        return {f"{int(total) % (1 << 64):016x}" for total in totals.values()}


def _whole_shape(half: ParamEntry) -> Shape:
    num_rows = sum(block.num_rows for block in half.mapping.blocks(0, 1))
    return (num_rows, *half.mapping.sources[0].shape[1:])
