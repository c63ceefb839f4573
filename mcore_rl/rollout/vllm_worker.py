"""Inside vLLM's worker: the receiving end of weight syncs, routes, and three CPU repairs.

vLLM imports this module in every worker process, because `worker_extension_cls` names
`WorkerExtension`; the import registers `LinkedWeights` for vLLM's update sessions.

Repairs, all for vLLM 0.32.0 on CPU, where weights are packed when they are loaded:

* A reload of a mixture of experts skips the packing, since the kernel exists already
  (unquantized_fused_moe_method.py, _setup_kernel): raw weights land in packed buffers and
  log-probabilities are wrong by whole units. The kernels are reset before a reload.
* A tied output layer receives no weights of its own, so its packed copy stays at the old weights
  (layers/utils.py, dispatch_cpu_unquantized_gemm). It is packed again after a reload.
* The kernel for rotary positions uses the second last stride of the queries as the stride of a
  token. For queries [tokens, heads, size], as in latent attention (DeepSeek), that is the stride of
  a head: all but one head of a few tokens are rotated wrongly, with any weights. Such queries use
  vLLM's native form (layers/rotary_embedding/base.py, RotaryEmbedding.forward_native).

`tests/integration/test_vllm_weight_sync.py` fails without them; drop each when it passes without.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from mcore_rl.errors import WeightSyncError
from mcore_rl.processes import die_with_parent
from mcore_rl.rollout.vllm_adapters import (
    Adapters,
    is_half,
    put_wrappers_on,
    take_wrappers_off,
)
from mcore_rl.rollout.vllm_digests import LoadedDigests, tensors_of_folder
from mcore_rl.rollout.vllm_loading import skip_copies
from mcore_rl.rollout.vllm_routes import RouteRecorder
from mcore_rl.weight_sync.base import TRANSPORTS, Link
from mcore_rl.weight_sync.digest import Manifest
from mcore_rl.weight_sync.intake import Intake


@dataclass
class LinkInfo(WeightTransferInitInfo):
    """What the receiver is opened with. Over HTTP it is the fields of a link, and an update is the
    fields of an update."""

    link: Link | dict[str, Any]
    adapters: tuple[int, int] | None = None
    """Rank and alpha of the adapters that come in addition to the weights."""


@dataclass
class DeliveredUpdate(WeightTransferUpdateInfo):
    """What the sender delivered; only the receiver knows its meaning."""

    update: Any


def _end_with_parent() -> None:
    """If vLLM has started this process for a rank of an engine: make it end with the engine,
    however that ends. Otherwise it runs for ever, and keeps its memory and a core."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid == os.getppid():
        die_with_parent(os.getppid())


_BROKEN = "an engine whose last weight update broke off takes no other"


class LinkedWeights(WeightTransferEngine[LinkInfo, DeliveredUpdate]):
    """Loads the tensors that a receiver makes of an update; checkpoint format, layer by layer.

    vLLM's own calls have no arguments for the version before the session, the manifest before its
    end, and an abort. The engine passes these through `WorkerExtension`.
    """

    init_info_cls = LinkInfo
    update_info_cls = DeliveredUpdate
    intake: Intake
    adapters: Adapters | None = None
    digests: LoadedDigests | None = None
    is_broken = _wants_digests = _is_open = _has_base = False

    def init_transfer_engine(self, init_info: LinkInfo) -> None:
        _end_with_parent()
        link = init_info.link
        self._reader: TypeAdapter[Any] | None = None
        if isinstance(link, dict):
            link = Link(**link)
            kind: Any = TRANSPORTS.get(link.transport).update
            self._reader = TypeAdapter(kind)
        if hasattr(self, "intake"):  # a server serves one run after the other
            self.intake.close()
        elif self.device.type == "cpu":
            _rotate_every_head(self.model)
        own = self.parallel_config.rank % link.num_receivers
        self.intake = Intake(replace(link, receiver=own), self._load)
        if init_info.adapters is not None:
            self.adapters = Adapters(*init_info.adapters)

    def begin(self, version: int, with_digests: bool) -> None:
        """Prepare for a session."""
        if self.is_broken:  # half loaded layers would count the same weights twice
            raise WeightSyncError(_BROKEN, role="rollout")
        self.is_broken = True  # until it is finished
        self.digests, self._wants_digests = None, with_digests
        if self.adapters is not None:
            self.adapters.clear()
        self.intake.begin(version)

    def start_weight_update(self) -> None:
        """With adapters the layers are opened only when weights for them come."""
        if self.adapters is None:
            self._open_layers()

    def _open_layers(self) -> None:
        self._is_open = True
        if self.adapters is not None:
            take_wrappers_off(self.model)
        self.digests = LoadedDigests(self.model) if self._wants_digests else None
        if self.device.type == "cpu":
            _reset_packed_moe_kernels(self.model)
        initialize_layerwise_reload(self.model)
        if self.device.type == "cpu":
            skip_copies(self.model)

    def receive_weights(self, update_info: DeliveredUpdate) -> None:
        update = update_info.update
        self.intake.receive(self._reader.validate_python(update) if self._reader else update)

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self.adapters is not None:
            tensors = list(tensors)
            self.adapters.add(named for named in tensors if is_half(named[0]))
            tensors = [named for named in tensors if not is_half(named[0])]
            if not tensors:
                return
            if not self._is_open:
                self._open_layers()
        self.model.load_weights(iter(tensors))  # pyright: ignore

    def differences(self, manifest: Manifest) -> list[str]:
        """Return the errors in the arrived weights, and what else the engine lacks."""
        lines = self.intake.differences(manifest)
        if not (self._is_open or self._has_base):
            lines.append("the weights that do not train never arrived")
        if self.adapters is not None and not self.adapters.have_arrived:
            lines.append("the adapters did not arrive")
        return lines

    def finish_weight_update(self) -> None:
        if self._is_open:
            self._close_layers()
        self._has_base, self.is_broken = True, False
        self.intake.end()

    def _close_layers(self) -> None:
        self._is_open = False
        finalize_layerwise_reload(self.model, self.model_config)
        if self.digests is not None:
            self.digests.finish()
        if self.device.type == "cpu":
            _pack_tied_output_layers(self.model)
        if self.adapters is not None:
            put_wrappers_on(self.model)

    def load_folder(self, folder: str) -> dict[str, str]:
        """Load a Hugging Face folder with vLLM's own reader and return the digests; afterwards the
        model's weights are not those of a sync."""
        self._wants_digests, self._has_base, self.is_broken = True, False, True
        with set_current_vllm_config(self.vllm_config):
            self._open_layers()
            self._load(tensors_of_folder(folder, self.model_config, self.model))
            self._close_layers()
        self.is_broken = False
        assert self.digests is not None
        return self.digests.by_name

    def abort(self) -> None:
        """Give up the session and the engine: its layers are half loaded."""
        self.is_broken = True
        self.intake.end()

    def shutdown(self) -> None:
        if hasattr(self, "intake"):  # vLLM may give up before
            self.intake.close()


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


def _pack_tied_output_layers(model: torch.nn.Module) -> None:
    embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    for head in embeddings:
        is_tied = any(other.weight is head.weight for other in embeddings if other is not head)
        if is_tied and isinstance(head, ParallelLMHead) and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)  # pyright: ignore


WeightTransferEngineFactory.register_engine("linked", LinkedWeights)


class WorkerExtension:
    """Methods that an engine calls on its worker by name; vLLM's worker must not have these
    names."""

    model_runner: Any
    vllm_config: VllmConfig
    weight_transfer_engine: LinkedWeights

    def begin_intake(self, version: int, with_digests: bool) -> None:
        """Prepare for an update session; to be called before vLLM's start."""
        self.weight_transfer_engine.begin(version, with_digests)

    def differences_from(self, manifest: Manifest) -> list[str]:
        """Return how the tensors at the loader differ from the manifest; call it before vLLM's
        finish."""
        return self.weight_transfer_engine.differences(manifest)

    def take_adapters(self, request: LoRARequest) -> list[str]:
        """Use the adapters of the session, for running requests too. Call it after vLLM's finish,
        which removes all adapters. Return layers that the model does not have."""
        adapters = self.weight_transfer_engine.adapters
        assert adapters is not None, "started without adapters"
        for state in self.model_runner.requests.values():
            state.lora_request = request
        return adapters.take(self.weight_transfer_engine.model, request.lora_int_id)

    def differences_from_json(self, manifest: str) -> list[str]:
        """Do the same with a manifest from `Manifest.to_json`."""
        return self.differences_from(Manifest.from_json(manifest))

    def abort_intake(self) -> None:
        """Give up a session, in place of vLLM's finish."""
        self.weight_transfer_engine.abort()

    def broken_updates(self) -> list[str]:
        """Return why the worker takes no weights, nothing if it does."""
        return [_BROKEN] * self.weight_transfer_engine.is_broken

    def loaded_digests(self) -> dict[str, str]:
        """Return the digests of the last session; see `LoadedDigests`."""
        digests = self.weight_transfer_engine.digests
        return {} if digests is None else digests.by_name

    def load_folder(self, folder: str) -> dict[str, str]:
        """Load a Hugging Face folder by vLLM's own loader and return the digests of that."""
        return self.weight_transfer_engine.load_folder(folder)

    def record_routes(self, layers: Sequence[int]) -> None:
        """Record the experts of everything computed from now on; see `RouteRecorder`."""
        self._routes = RouteRecorder(self.model_runner, self.vllm_config, layers)

    def take_routes(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return what was recorded of requests; see `RouteRecorder.take`."""
        return self._routes.take(names)
