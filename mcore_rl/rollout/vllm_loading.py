"""Loads weights into vLLM's layers on a CPU without unnecessary copies.

vLLM 0.32.0 reloads a layer in four steps: allocate its parameters, copy the weights into them, pack
them for the CPU's kernels (also a copy), and copy the result into the original memory.

* If the weights of a linear layer or an embedding are contiguous in memory, in the order of its
  parameter, that memory becomes the parameter, until it is packed or copied from there. Weights
  from a weight transport or a single train worker are contiguous: the query, key and value
  projections of a layer, and its gate and up projections.
* vLLM keeps the experts of a layer until all have come, and then loads them one by one, each as
  slowly as a whole layer. Here they are copied to their places at once and loaded as one.
* Only CUDA graphs need the original memory. Packed experts stay where they were packed.

The hooks are a parameter's `weight_loader`, a module's `load_weights`, and vLLM's record of a layer
while it reloads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

_WHOLE = [None]
_HEADS = ["q", "k", "v"]


def skip_copies(model: torch.nn.Module) -> None:
    """Load the layers of a model without these copies; call it after the layers were opened."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
            if getattr(layer, "tp_size", 1) == 1:
                _replace_loader(layer.weight, partial(_InPlace, layer))
        elif isinstance(layer, RoutedExperts) and isinstance(method, UnquantizedFusedMoEMethod):
            if not any(True for _ in layer.buffers(recurse=False)):
                get_layerwise_info(layer).kernel_tensors = None
            if _Experts.are_all_of(layer):
                layer.load_weights = _Experts(layer).load


class _Loader:
    """A parameter's loader. It acts in the second of its two calls, which has memory; with the
    first, on the meta device, vLLM counts the weights that have come."""

    def __init__(self, load: Callable[..., Any]) -> None:
        update_wrapper(self, load)
        self._load = load

    def whole(self, param: Tensor) -> Tensor | None:
        """Return the new content of the parameter, if it is known without loading."""
        raise NotImplementedError

    def __call__(self, param: Any, *args: Any, **kwargs: Any) -> Any:
        whole = self.whole(param)
        if whole is None:
            return self._load(param, *args, **kwargs)
        param.data = whole
        return True


def _replace_loader(param: Any, kind: Callable[[Callable[..., Any]], _Loader]) -> None:
    """vLLM wraps a loader once and keeps it for all reloads."""
    load = param.weight_loader.__wrapped__
    param.weight_loader.__wrapped__ = kind(load._load if isinstance(load, _Loader) else load)


class _InPlace(_Loader):
    """Leaves the weights where they are."""

    def __init__(self, layer: torch.nn.Module, load: Callable[..., Any]) -> None:
        super().__init__(load)
        self._layer = layer

    def whole(self, param: Tensor) -> Tensor | None:
        """Return all weights that came for the layer as one tensor, if they are contiguous."""
        loads = get_layerwise_info(self._layer).loaded_weights
        given = [args.arguments for name, args in loads if name == "weight"]
        shards = [arguments.get("loaded_shard_id") for arguments in given]
        if shards not in (_WHOLE, _HEADS, list(range(len(shards)))):
            return None
        weights: list[Tensor] = [arguments["loaded_weight"] for arguments in given]
        first, rows, place = weights[0], 0, weights[0].data_ptr()
        for weight in weights:
            if (
                weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
                or weight.data_ptr() != place
                or not weight.is_contiguous()
                or weight.dtype != param.dtype
                or weight.shape[1:] != param.shape[1:]
            ):
                return None
            rows, place = rows + weight.shape[0], place + weight.nbytes
        is_whole = rows == param.shape[0] and param.is_contiguous()
        return first.detach().as_strided(param.shape, param.stride()) if is_whole else None


class _Taken(_Loader):
    """Takes one of the tensors that the experts of a layer were copied to."""

    def __init__(self, given: dict[str, Tensor], name: str, load: Callable[..., Any]) -> None:
        super().__init__(load)
        self._given, self._name = given, name

    def whole(self, param: Tensor) -> Tensor | None:
        return self._given.get(self._name)


class _Experts:
    """Takes the experts of one layer, in any order and number, for one reload."""

    def __init__(self, layer: RoutedExperts) -> None:
        self._layer = layer
        self._load_others = type(layer).load_weights.__get__(layer)
        self._whole: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}
        self._waiting = {
            weight_name.partition("experts.")[2] + "weight": (expert, shard)
            for _, weight_name, expert, shard in layer.get_expert_mapping()
        }

    @staticmethod
    def are_all_of(layer: RoutedExperts) -> bool:
        """Return whether the parameters of a layer are its experts in full, and nothing else."""
        config = layer.moe_config
        experts, size = layer.local_num_experts, config.intermediate_size_per_partition
        return (
            set(layer._parameters) == {"w13_weight", "w2_weight"}
            and len(layer.get_expert_mapping()) == 3 * experts
            and layer.w13_weight.shape == (experts, 2 * size, config.hidden_dim)
            and layer.w2_weight.shape == (experts, config.hidden_dim, size)
            and config.moe_parallel_config.tp_size == config.moe_parallel_config.ep_size == 1
        )

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Do the same as `RoutedExperts.load_weights`."""
        for name, weight in weights:
            if name not in self._waiting:
                yield from self._load_others([(name, weight)])
                continue
            if not self._whole:
                self._whole = {
                    own: torch.empty(param.shape, dtype=param.dtype)
                    for own, param in self._layer.named_parameters(recurse=False)
                }
                gate, up = self._whole["w13_weight"].chunk(2, dim=1)
                self._parts = {"w1": gate, "w3": up, "w2": self._whole["w2_weight"]}
            expert, shard = self._waiting.pop(name)
            self._parts[shard][expert].copy_(weight)
            if not self._waiting:
                self._give()
            yield "w2_weight" if shard == "w2" else "w13_weight"

    def _give(self) -> None:
        """Give all experts to vLLM's loader at once."""
        for name, shards in (("w13_weight", ("w1", "w3")), ("w2_weight", ("w2",))):
            param: Any = getattr(self._layer, name)
            _replace_loader(param, partial(_Taken, self._whole, name))
            for shard in shards:
                param.weight_loader(param, self._parts[shard], name, shard, 0, return_success=True)
        self._whole.clear()  # the loaders stay
        self._parts.clear()
