"""The adapters of LoRA inside vLLM's worker, which come by weight syncs instead of from a folder.

vLLM wraps the adapted layers. While a model's weights are loaded the wrappers are off, so that it
has the modules and the names that it was built with, which is what reloading looks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

_HALVES = (".lora_A.weight", ".lora_B.weight")


def is_half(name: str) -> bool:
    """Whether a tensor is half an adapter, by PEFT's name."""
    return name.endswith(_HALVES)


class Adapters:
    """Those of the current session, then those that are computed with.

    Args:
        rank: r.
        alpha: what they add is scaled by alpha / r.
    """

    def __init__(self, rank: int, alpha: int) -> None:
        self._rank, self._alpha = rank, alpha
        self._arrived: dict[str, torch.Tensor] = {}

    @property
    def have_arrived(self) -> bool:
        """Whether the session has brought some."""
        return bool(self._arrived)

    def clear(self) -> None:
        """Forget what has arrived."""
        self._arrived.clear()

    def add(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Keep what arrives; the receiver may free it at the end of the session."""
        self._arrived |= {name: tensor.detach().clone() for name, tensor in tensors}

    def take(self, model: Any, number: int) -> list[str]:
        """Have the model know what has arrived by this number, and no other adapters; return layers
        that it has not."""
        # Not by add_lora, which reads a folder; that they are there is all that vLLM asks later.
        manager = model.lora_manager
        adapter = LoRAModel.from_lora_tensors(
            number,
            self._arrived,
            PEFTHelper(r=self._rank, lora_alpha=self._alpha, target_modules=[]),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
        )
        self.clear()
        manager.remove_all_adapters()
        manager.add_adapter(adapter)  # packs what vLLM packs: query, key and value
        manager.activate_adapter(adapter.id)
        return sorted(adapter.loras.keys() - manager.modules.keys())


def take_wrappers_off(model: Any) -> None:
    """Put the layers themselves into the model in place of what wraps them."""
    for name, wrapper in model.lora_manager.modules.items():
        _put(model, name, wrapper.base_layer)


def put_wrappers_on(model: Any) -> None:
    """Undo `take_wrappers_off`."""
    for name, wrapper in model.lora_manager.modules.items():
        _put(model, name, wrapper)


def _put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
