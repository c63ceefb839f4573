"""Inside vLLM's worker: the receiving end of weight syncs, routes, and three CPU repairs.

vLLM imports this module in every worker process, because `worker_extension_cls` names
`WorkerExtension`; importing it registers what takes part in vLLM's update sessions.

Repairs, all for vLLM 0.32.0 on CPU, where weights are packed when they are loaded:

* A reload of a mixture of experts skips the packing, since the kernel exists already
  (unquantized_fused_moe_method.py, _setup_kernel): raw weights land in packed buffers and
  log-probabilities are wrong by whole units. The kernels are reset before a reload.
* A tied output layer receives no weights of its own, so its packed copy stays at the old weights
  (layers/utils.py, dispatch_cpu_unquantized_gemm). It is packed again after a reload.
* The kernel for rotary positions takes the second last stride of the queries for that of a token.
  Of queries [tokens, heads, size], which latent attention (DeepSeek) has, that is the stride of a
  head: all but one head of a few tokens are rotated wrongly, from whatever weights. Such queries go
  through vLLM's native form (layers/rotary_embedding/base.py, RotaryEmbedding.forward_native).

`tests/integration/test_vllm_weight_sync.py` fails without them; drop each when it passes without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from mcore_rl.rollout.vllm_routes import RouteRecorder
from mcore_rl.weight_sync.base import Link, NamedTensors, Receiver


@dataclass
class LinkInfo(WeightTransferInitInfo):
    """What the receiver is opened by."""

    link: Link


@dataclass
class DeliveredUpdate(WeightTransferUpdateInfo):
    """What the sender had delivered; only the receiver knows what it is."""

    version: int
    update: Any


class LinkedWeights(WeightTransferEngine[LinkInfo, DeliveredUpdate]):
    """Loads what the receiver of any transport makes of an update; checkpoint format, layer by
    layer."""

    init_info_cls = LinkInfo
    update_info_cls = DeliveredUpdate
    _receiver: Receiver[Any]

    def init_transfer_engine(self, init_info: LinkInfo) -> None:
        self._receiver = init_info.link.open_receiver()
        if self.device.type == "cpu":
            _rotate_every_head(self.model)

    def start_weight_update(self) -> None:
        if self.device.type == "cpu":
            _reset_packed_moe_kernels(self.model)
        initialize_layerwise_reload(self.model)
        self._has_begun = False  # vLLM's start has no version; the first update brings it

    def receive_weights(self, update_info: DeliveredUpdate) -> None:
        if not self._has_begun:
            self._receiver.begin(update_info.version)
            self._has_begun = True
        self._receiver.receive(update_info.update, self._load)

    def _load(self, tensors: NamedTensors) -> None:
        self.model.load_weights(iter(tensors))  # pyright: ignore

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _pack_output_layers_again(self.model)
        self._receiver.end()

    def shutdown(self) -> None:
        if hasattr(self, "_receiver"):  # vLLM may give up before
            self._receiver.close()


def _rotate_every_head(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module._forward_method = partial(_rotate, module, module._forward_method)


def _rotate(
    rotary: RotaryEmbedding,
    forward: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (rotary.forward_native if query.dim() == 3 else forward)(positions, query, key)


def _reset_packed_moe_kernels(model: torch.nn.Module) -> None:
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _pack_output_layers_again(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)  # pyright: ignore


WeightTransferEngineFactory.register_engine("linked", LinkedWeights)


class WorkerExtension:
    """What an engine calls on its worker by name; the names must not be those of vLLM's worker."""

    model_runner: Any
    vllm_config: VllmConfig

    def record_routes(self, layers: Sequence[int]) -> None:
        """Record the experts of everything computed from now on; see `RouteRecorder`."""
        self._routes = RouteRecorder(self.model_runner, self.vllm_config, layers)

    def take_routes(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return what was recorded of requests; see `RouteRecorder.take`."""
        return self._routes.take(names)
