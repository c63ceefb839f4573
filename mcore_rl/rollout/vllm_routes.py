"""Experts of every token, where vLLM itself does not return them.

On CUDA an engine inside several train workers has a scheduler in each, and each must return the
experts. vLLM gives only the first rank the collector: see `keep_routes_on_every_rank`.

vLLM 0.32.0 returns routed experts only from its second model runner, which needs Triton
(config/vllm.py, "AuxOutput Connector requires Model Runner V2"), so not on CPU. Its capturer
(fused_moe/routed_experts_capturer.py) works under either runner: `RouteRecorder` binds it and reads
it after every forward. Drop this file when vLLM returns them on CPU.

A token's experts are kept where its keys and values are: by slot of the KV cache. So a cached
prompt has its experts, whichever request computed it, also in the same forward.

Invariant: the record of a request covers its first tokens without a gap, as many as the engine has
computed. A preempted request is computed again, and recorded again from where that begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import vllm.distributed.aux_output_connector.worker as aux_output_worker
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)


class _AsFirstRank:
    """A tensor-parallel group in which this rank counts as the first."""

    is_first_rank = True

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def keep_routes_on_every_rank() -> None:
    """Make every rank of the engine that is started in this process collect experts.

    vLLM 0.32 and 0.33 ask whether a rank is the first (aux_output_connector/worker.py,
    AuxOutputWorkerConnector), and schedulers of other ranks then fail without its output
    (connector.py, take_output). All ranks take part in the capture and get the same experts.
    """
    aux_output_worker.get_tp_group = lambda: _AsFirstRank(get_tp_group())  # pyright: ignore


class RouteRecorder:
    """Records the experts of everything that `model_runner` computes from now on.

    Args:
        model_runner: vLLM's first model runner, model loaded and KV cache allocated.
        vllm_config: of the engine.
        layers: decoder layers with experts, from 0.
    """

    def __init__(self, model_runner: Any, vllm_config: VllmConfig, layers: Sequence[int]) -> None:
        assert len(model_runner.kv_cache_config.kv_cache_groups) == 1, "one slot per token"
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._capturer = RoutedExpertsCapturer(max_tokens, vllm_config)
        bind_routed_experts_capturer(model_runner.get_model(), self._capturer)
        self._batch = model_runner.input_batch
        self._table = self._batch.block_table[0]
        self._layers = list(layers)
        num_slots = model_runner.kv_cache_config.num_blocks * self._table.block_size
        routes = self._captured(0)
        self._at_slot = np.zeros((num_slots, *routes.shape[1:]), routes.dtype)
        self._of_request: dict[str, list[np.ndarray]] = {}
        forward = model_runner.execute_model

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            output = forward(scheduled, *args, **kwargs)
            self._record(scheduled.num_scheduled_tokens)
            return output

        model_runner.execute_model = execute_model

    def take(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the experts of requests that have ended, by vLLM's internal request id, and drop
        them.

        [computed tokens, layers, topk] uint8, or uint16 with more than 256 experts.
        """
        found = {name: self._of_request.pop(name) for name in names if name in self._of_request}
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def _captured(self, num_tokens: int) -> np.ndarray:
        """Return the experts of the forward's first tokens, [num_tokens, layers, topk]."""
        return self._capturer.snapshot_routing_data(num_tokens).numpy()[:, self._layers]

    def _record(self, num_scheduled: dict[str, int]) -> None:
        """Take over the experts of the forward that just ran; `num_scheduled` by request."""
        computed = []
        for row, name in enumerate(self._batch.req_ids):
            if count := num_scheduled.get(name, 0):
                start = int(self._batch.num_computed_tokens_cpu[row])
                computed.append((name, start, self._slots(row, start + count)))
        if not computed:
            return
        written = np.concatenate([slots[start:] for _, start, slots in computed])
        self._at_slot[written] = self._captured(len(written))
        # Only now: a request may share blocks with another one of the same forward.
        for name, start, slots in computed:
            parts = self._of_request.setdefault(name, [])
            known = sum(map(len, parts))
            if known > start:  # it was preempted
                parts[:] = [np.concatenate(parts)[:start]]
                known = start
            parts.append(self._at_slot[slots[known:]])

    def _slots(self, row: int, num_tokens: int) -> np.ndarray:
        """Return the slots of a request's first tokens."""
        position, size = np.arange(num_tokens), self._table.block_size
        return self._table.get_numpy_array()[row][position // size] * size + position % size
