"""Inside vLLM's worker: weight-update backends of this project and two CPU repairs.

vLLM imports this module in every worker process, because `worker_extension_cls` names
`WorkerExtension`; importing it registers the backends.

Repairs, both for vLLM 0.32.0 on CPU, where weights are packed when they are loaded:

* A reload of a mixture of experts skips the packing, since the kernel exists already
  (unquantized_fused_moe_method.py, _setup_kernel): raw weights land in packed buffers and
  log-probabilities are wrong by whole units. The kernels are reset before a reload.
* A tied output layer receives no weights of its own, so its packed copy stays at the old weights
  (layers/utils.py, dispatch_cpu_unquantized_gemm). It is packed again after a reload.

`tests/integration/test_vllm_weight_sync.py` fails without them; drop each when it passes without.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


@dataclass
class DirectInit(WeightTransferInitInfo):
    """The direct backend needs nothing to start."""


@dataclass
class DirectUpdate(WeightTransferUpdateInfo):
    """One bucket of full tensors under their Hugging Face names, by reference."""

    named_tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)


class DirectWeightTransfer(WeightTransferEngine[DirectInit, DirectUpdate]):
    """Takes tensors from a trainer in the same process; checkpoint format, layer by layer."""

    init_info_cls = DirectInit
    update_info_cls = DirectUpdate

    def init_transfer_engine(self, init_info: DirectInit) -> None:
        pass

    def start_weight_update(self) -> None:
        if self.device.type == "cpu":
            _reset_packed_moe_kernels(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: DirectUpdate) -> None:
        self.model.load_weights(iter(update_info.named_tensors))  # pyright: ignore

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _pack_output_layers_again(self.model)

    def shutdown(self) -> None:
        pass


def _reset_packed_moe_kernels(model: torch.nn.Module) -> None:
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _pack_output_layers_again(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)  # pyright: ignore


WeightTransferEngineFactory.register_engine("direct", DirectWeightTransfer)


class WorkerExtension:
    """Named by `worker_extension_cls` so that vLLM imports this module; adds nothing itself."""
