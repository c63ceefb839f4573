"""vLLM in the process of the train worker, or a part of it in each of several.

With tensor parallelism every rank of the engine has an `LLM` of its own that schedules the same
requests in the same order; the forward passes meet in vLLM's process group.

The engine starts without weights (`load_format="dummy"`) and without a tokenizer; weights arrive
by its native update lifecycle. Log-probabilities are those after temperature. Routed experts, when
asked for, are vLLM's own on CUDA and those of `vllm_routes.py` on CPU. vLLM seeds and consumes
torch's global random state and replaces `torch.set_num_threads`; both are put back, so a trainer in
the same process does not notice it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# vLLM reads these while it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # run in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

import numpy as np
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # The compressed form of latent attention takes one size of heads and no float32 where the CPU
    # has AMX (v1/attention/backends/mla/amx_mla.py), and has no cache of prefixes on any.
    os.environ.setdefault("VLLM_MLA_DISABLE", "1")

import vllm
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.parallel_state import get_tp_group

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.base import (
    EngineSpec,
    GenerationRequest,
    GenerationResult,
)
from mcore_rl.weight_sync.base import Link
from mcore_rl.weight_sync.digest import Manifest
from mcore_rl.weight_sync.intake import refuse

logger = logging.getLogger(__name__)

CPU_KV_CACHE_BYTES = 256 << 20
CPU_TOKENS_PER_FORWARD = 4096


@contextlib.contextmanager
def _process_state_kept() -> Iterator[None]:
    """Put back the global random states and the thread setter that vLLM changes."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    torch_state, set_num_threads = torch.get_rng_state(), torch.set_num_threads
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        torch.set_num_threads = set_num_threads


class VllmEngine:
    """A `RolloutEngine` on `vllm.LLM`; start it after the process group of the trainer exists,
    or vLLM makes a default group of its own.

    Args:
        spec: model, limits and the `rollout` section.
        link: by which its weights come.
    """

    def __init__(self, spec: EngineSpec, link: Link) -> None:
        self.weight_version = -1
        self._stop_token_ids, self._stop = list(spec.stop_token_ids), list(spec.config.stop)
        self._routing = spec.routing
        cfg = spec.config
        self._is_part = cfg.tensor_model_parallel_size > 1
        self._on_cpu = on_cpu = not torch.cuda.is_available()
        settings: dict[str, Any] = {
            "model": spec.model_path,
            "dtype": spec.dtype,
            "load_format": "dummy",
            "trust_remote_code": False,
            "skip_tokenizer_init": not cfg.stop,  # token ids come in and go out
            "max_model_len": spec.max_model_len,
            "max_num_seqs": cfg.max_num_seqs,
            "tensor_parallel_size": cfg.tensor_model_parallel_size,
            # Ranks of the default process group that lie side by side make an engine.
            "distributed_executor_backend": "external_launcher" if self._is_part else "uni",
            "enforce_eager": on_cpu if cfg.enforce_eager is None else cfg.enforce_eager,
            "logprobs_mode": "processed_logprobs",
            "weight_transfer_config": WeightTransferConfig(backend="linked"),  # pyright: ignore
            "worker_extension_cls": "mcore_rl.rollout.vllm_worker.WorkerExtension",
            "generation_config": "vllm",  # sampling comes from the request alone
            "hf_overrides": dict(spec.config_overrides),
            "enable_return_routed_experts": spec.routing is not None and not on_cpu,
            "disable_log_stats": True,
            "seed": 0,
        }
        chunking = {
            "enable_chunked_prefill": cfg.enable_chunked_prefill,
            "max_num_batched_tokens": cfg.max_num_batched_tokens,
        }
        chunking = {name: value for name, value in chunking.items() if value is not None}
        if on_cpu:
            # The last draw of a prompt that is computed in chunks is taken back by setting the
            # generator's offset (gpu_model_runner.py:3502), which a CPU generator does not have.
            for name in chunking:
                logger.warning("rollout.%s is not read on CPU: prompts are computed whole", name)
            chunking["enable_chunked_prefill"] = False
            chunking["max_num_batched_tokens"] = max(
                CPU_TOKENS_PER_FORWARD, spec.max_model_len, cfg.max_num_seqs
            )
        settings |= chunking
        kv_cache_bytes = cfg.kv_cache_memory_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None)
        if kv_cache_bytes is not None:
            settings["kv_cache_memory_bytes"] = kv_cache_bytes
        else:
            settings["gpu_memory_utilization"] = cfg.gpu_memory_utilization
        if on_cpu and self._is_part:
            _remove_shared_memory(cfg.tensor_model_parallel_size)
        with _process_state_kept():
            self._llm = vllm.LLM(**{**settings, **cfg.engine_kwargs})
        self._llm.init_weight_transfer_engine({"init_info": {"link": link}})
        if spec.routing is not None and on_cpu:
            self._llm.collective_rpc("record_routes", args=(spec.routing.layers,))

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Return one result per request, in order; see `RolloutEngine.generate`."""
        if self.weight_version < 0:
            raise RolloutError("generate was called without complete weights", role="rollout")
        if not requests:
            return []
        prompts: Any = [{"prompt_token_ids": r.prompt_token_ids.tolist()} for r in requests]
        params = [self._sampling_params(request) for request in requests]
        with _process_state_kept():
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
        if len(outputs) != len(requests):
            raise RolloutError(f"{len(requests)} requests, {len(outputs)} results", role="rollout")
        routes = self._routed_experts(outputs)
        results = [
            self._result(output.outputs[0], experts)
            for output, experts in zip(outputs, routes, strict=True)
        ]
        if self._is_part:
            _check_lockstep(results)
        return results

    def _sampling_params(self, request: GenerationRequest) -> vllm.SamplingParams:
        sampling = request.sampling
        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            stop_token_ids=self._stop_token_ids,
            stop=self._stop,
            logprobs=0,  # the sampled token's own
            flat_logprobs=True,  # one list of them, without an object per token
            detokenize=bool(self._stop),
        )

    def _routed_experts(self, outputs: Sequence[Any]) -> list[np.ndarray | None]:
        """Return the experts of each output's tokens but the last, None where vLLM has none."""
        if self._routing is None:
            return [None] * len(outputs)
        if self._on_cpu:
            recorded = self._llm.collective_rpc("take_routes")[0]
            # vLLM appends a suffix to the id that it gave a request.
            by_id = {name.rpartition("-")[0]: routes for name, routes in recorded.items()}
            found = [by_id.get(output.request_id) for output in outputs]
        else:
            layers = list(self._routing.layers)  # vLLM has a row for every layer
            found = [output.outputs[0].routed_experts for output in outputs]
            found = [None if routes is None else routes[:, layers] for routes in found]
        # A token is an input only if the engine went on after it.
        lengths = [len(o.prompt_token_ids) + len(o.outputs[0].token_ids) - 1 for o in outputs]
        return [
            None if routes is None else routes[:n] for routes, n in zip(found, lengths, strict=True)
        ]

    def _result(self, output: Any, routed_experts: np.ndarray | None) -> GenerationResult:
        return GenerationResult(
            token_ids=np.array(output.token_ids, np.int32),
            logprobs=np.array(output.logprobs.logprobs, np.float32),
            finish_reason=output.finish_reason or "abort",
            weight_version=self.weight_version,
            routed_experts=routed_experts,
        )

    def start_weight_update(self, version: int, with_digests: bool = False) -> None:
        self.weight_version = -1
        self._coming_version = version
        self._llm.collective_rpc("begin_intake", args=(version, with_digests))
        self._llm.start_weight_update()

    def update_weights(self, update: Any) -> None:
        self._llm.update_weights({"update_info": {"update": update}})

    def finish_weight_update(self, manifest: Manifest) -> None:
        for differences in self._llm.collective_rpc("differences_from", args=(manifest,)):
            refuse(differences, self._coming_version)
        self._llm.finish_weight_update(weight_version=str(self._coming_version))
        if not self._llm.reset_prefix_cache():
            raise RolloutError("cached keys and values survived a weight update", role="rollout")
        self.weight_version = self._coming_version

    def abort_weight_update(self) -> None:
        self.weight_version = -1
        self._llm.collective_rpc("abort_intake")

    def loaded_digests(self) -> list[dict[str, str]]:
        return self._llm.collective_rpc("loaded_digests")

    def digests_of_folder(self, folder: str) -> list[dict[str, str]]:
        """Return what `loaded_digests` would be for an engine that starts from a Hugging Face
        folder; this one is without weights afterwards."""
        self.weight_version = -1
        return self._llm.collective_rpc("load_folder", args=(folder,))

    def close(self) -> None:
        del self._llm


def _remove_shared_memory(engine_size: int) -> None:
    """Remove what a run that was killed has left of an engine of these ranks.

    On CPU vLLM calls an engine's shared memory by its ranks alone, and does not start where some of
    that name is (cpu_communicator.py, make_group_name). Whoever uses it has it mapped and keeps it.
    The first rank does it before the others can come to need it: they meet it before.
    """
    place, first = dist.get_rank() % engine_size, dist.get_rank() // engine_size * engine_size
    ranks = "-".join(str(first + i) for i in range(engine_size))
    for file in Path("/dev/shm").iterdir() if place == 0 else ():
        if f"[{ranks}]-cpushm" in file.name and file.stat().st_uid == os.getuid():
            file.unlink(missing_ok=True)


def _check_lockstep(results: Sequence[GenerationResult]) -> None:
    """Raise a RolloutError unless all ranks of the engine drew the same tokens; collective."""
    group = get_tp_group()
    drawn = hashlib.sha256(repr([len(result.token_ids) for result in results]).encode())
    for result in results:
        drawn.update(result.token_ids.tobytes())
    own = drawn.hexdigest()
    found: list[Any] = [None] * group.world_size
    dist.all_gather_object(found, own, group=group.cpu_group)
    if len(set(found)) > 1:
        raise RolloutError(
            f"the ranks {group.ranks} of one engine drew different tokens", role="rollout"
        )
