"""Digests of the parameters that vLLM has loaded, before it packs them for its kernels.

On CPU vLLM replaces the weights of most layers by packed ones that its checksums do not see, or by
empty tensors. Here the digest of a layer is taken between loading and packing, by name and shape of
vLLM's own parameters (of this tensor-parallel rank): two engines of one size that loaded the same
weights have the same digests, whichever way the weights came.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from mcore_rl.weight_sync.digest import content_of, full_digest


class LoadedDigests:
    """Watches one load of a model's weights, from before it to `finish`; afterwards `by_name` has
    a digest of every parameter and every buffer that is kept in checkpoints."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.by_name: dict[str, str] = {}
        self._unpacked: list[tuple[torch.nn.Module, set[str]]] = []
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        methods = [getattr(module, "quant_method", None) for module in self._modules.values()]
        self._packing: list[Any] = [m for m in methods if isinstance(m, QuantizeMethodBase)]
        for method in self._packing:
            method.process_weights_after_loading = partial(  # shadows the class's own
                self._note_and_pack, type(method).process_weights_after_loading.__get__(method)
            )

    def _note_and_pack(self, pack: Any, layer: torch.nn.Module) -> None:
        before = {own: _identity(tensor) for own, tensor in _kept(layer)}
        self._note(layer, before)
        pack(layer)
        after = {own: _identity(tensor) for own, tensor in _kept(layer)}
        # Some are loaded after the rest of their layer was packed: routers' biases.
        self._unpacked.append((layer, {own for own in after if before.get(own) == after[own]}))

    def _note(self, module: torch.nn.Module, owns: Iterable[str]) -> None:
        name = self._names[module]
        for own, tensor in _kept(module):
            if own in owns:
                self.by_name[f"{name}.{own}" if name else own] = full_digest(tensor)

    def finish(self) -> None:
        """Take the digests of parameters that are not packed, and stop watching."""
        for method in self._packing:
            method.__dict__.pop("process_weights_after_loading", None)
        for module in self._modules.values():
            if not isinstance(getattr(module, "quant_method", None), QuantizeMethodBase):
                self._note(module, dict(_kept(module)))
        for module, owns in self._unpacked:
            self._note(module, owns)


def _kept(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return a module's own parameters, and the buffers that checkpoints have."""
    tensors = (*module._parameters.items(), *module._buffers.items())
    passing = module._non_persistent_buffers_set
    return [(own, tensor) for own, tensor in tensors if tensor is not None and own not in passing]


def _identity(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, int]:
    return tensor.shape, tensor.dtype, content_of(tensor)


def tensors_of_folder(
    folder: str, model_config: ModelConfig, model: torch.nn.Module
) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield the tensors of a Hugging Face folder as vLLM reads them when it starts from it."""
    of_folder = copy.copy(model_config)
    of_folder.model, of_folder.model_weights, of_folder.revision = folder, "", None
    loader = DefaultModelLoader(LoadConfig(load_format="auto", use_tqdm_on_load=False))
    return loader.get_all_weights(of_folder, model)
