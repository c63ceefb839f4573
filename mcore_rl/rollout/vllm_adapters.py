"""LoRA adapters inside vLLM's worker, which come by weight syncs instead of from a folder.

vLLM wraps the adapted layers. While a model's weights are loaded the wrappers are removed.
Reloading needs the modules and the names that the model was built with.
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
    """The adapters of the current session, then those in use.

    Args:
        rank: r.
        alpha: their output is scaled by alpha / r.
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
        """Keep copies of the tensors; the receiver may free them at the end of the session."""
        self._arrived |= {name: tensor.detach().clone() for name, tensor in tensors}

    def take(self, model: Any, number: int) -> list[str]:
        """Register the arrived adapters in the model under this number, and remove all others;
        return layers that the model does not have."""
        # Not by add_lora, which reads a folder; later vLLM only checks that they are registered.
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
        manager.add_adapter(adapter)  # packs like vLLM: query, key and value
        manager.activate_adapter(adapter.id)
        return sorted(adapter.loras.keys() - manager.modules.keys())


def take_wrappers_off(model: Any) -> None:
    """Replace the wrappers in the model by the wrapped layers."""
    for name, wrapper in model.lora_manager.modules.items():
        _put(model, name, wrapper.base_layer)


def put_wrappers_on(model: Any) -> None:
    """Undo `take_wrappers_off`."""
    for name, wrapper in model.lora_manager.modules.items():
        _put(model, name, wrapper)


def _put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
