"""vLLM, stepped in the process that calls it.

In a process of its own the engine starts vLLM's workers for tensor parallelism. In the train
workers' processes each of its ranks has an `LLM` that schedules the same requests in the same
order; the forward passes meet in vLLM's process group.

The engine starts without weights (`load_format="dummy"`) and without a tokenizer; weights arrive
by its native update lifecycle. Log-probabilities are those after temperature. Routed experts, when
asked for, are vLLM's own on CUDA and those of `vllm_routes.py` on CPU.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

# vLLM reads these while it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # run in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

import numpy as np
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # The compressed form of latent attention supports one head size and no float32 on CPUs with AMX
    # (v1/attention/backends/mla/amx_mla.py), and has no prefix cache on any CPU.
    os.environ.setdefault("VLLM_MLA_DISABLE", "1")

import vllm
from vllm.config.lora import MaxLoRARanks
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.lora.request import LoRARequest
from vllm.v1.engine import FinishReason

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.base import (
    CPU_KV_CACHE_BYTES,
    EngineAdapters,
    EnginePart,
    EngineSpec,
    GenerationRequest,
    GenerationResult,
)
from mcore_rl.rollout.vllm_routes import keep_routes_on_every_rank
from mcore_rl.types import VersionSpan
from mcore_rl.weight_sync.base import Link
from mcore_rl.weight_sync.digest import Manifest
from mcore_rl.weight_sync.intake import refuse

logger = logging.getLogger(__name__)

CPU_TOKENS_PER_FORWARD = 4096


class VllmEngine:
    """A `RolloutEngine` on `vllm.LLM`. In a trainer's process, start it after the trainer's process
    group exists; otherwise vLLM makes a default group of its own.

    Args:
        spec: model, limits and the `rollout` section.
        link: brings its weights.
    """

    def __init__(self, spec: EngineSpec, link: Link) -> None:
        self.weight_version = -1
        self._stop_token_ids, self._stop = list(spec.stop_token_ids), list(spec.config.stop)
        self._routing = spec.routing
        cfg = spec.config
        size = cfg.tensor_model_parallel_size
        self._is_part = size > 1 and not spec.is_apart
        self._on_cpu = on_cpu = not torch.cuda.is_available()
        settings: dict[str, Any] = {
            "model": spec.model_path,
            "dtype": spec.dtype,
            "load_format": "dummy",
            "trust_remote_code": False,
            "skip_tokenizer_init": not cfg.stop,  # token ids come in and go out
            "max_model_len": spec.max_model_len,
            "max_num_seqs": cfg.max_num_seqs,
            "tensor_parallel_size": size,
            "distributed_executor_backend": executor(size, is_apart=spec.is_apart),
            "enforce_eager": on_cpu if cfg.enforce_eager is None else cfg.enforce_eager,
            "logprobs_mode": "processed_logprobs",
            "weight_transfer_config": WeightTransferConfig(backend="linked"),  # pyright: ignore
            "worker_extension_cls": "mcore_rl.rollout.vllm_worker.WorkerExtension",
            "generation_config": "vllm",  # sampling comes from the request alone
            "hf_overrides": dict(spec.config_overrides),
            "enable_return_routed_experts": spec.routing is not None and not on_cpu,
            "enable_sleep_mode": cfg.sleep_level > 0 and not on_cpu,
            "disable_log_stats": True,
            "seed": 0,
        }
        chunking = {
            "enable_chunked_prefill": cfg.enable_chunked_prefill,
            "max_num_batched_tokens": cfg.max_num_batched_tokens,
        }
        chunking = {name: value for name, value in chunking.items() if value is not None}
        if on_cpu:
            # For a prompt computed in chunks, vLLM undoes the last draw by setting the generator's
            # offset (gpu_model_runner.py:3502), which a CPU generator does not have.
            for name in chunking:
                logger.warning("rollout.%s is not read on CPU: prompts are computed whole", name)
            chunking["enable_chunked_prefill"] = False
            chunking["max_num_batched_tokens"] = max(
                CPU_TOKENS_PER_FORWARD, spec.max_model_len, cfg.max_num_seqs
            )
        settings |= chunking | _lora_settings(spec.adapters)
        kv_cache_bytes = cfg.kv_cache_memory_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None)
        if kv_cache_bytes is not None:
            settings["kv_cache_memory_bytes"] = kv_cache_bytes
        else:
            settings["gpu_memory_utilization"] = cfg.gpu_memory_utilization
        if on_cpu and self._is_part:
            _remove_shared_memory(size)
        if self._is_part and settings["enable_return_routed_experts"]:
            keep_routes_on_every_rank()
        self._llm = vllm.LLM(**{**settings, **cfg.engine_kwargs})
        self._engine = self._llm.llm_engine
        self._requests: dict[int, str] = {}
        """vLLM's own names of the unfinished requests, by number."""
        self._drawn = hashlib.sha256()
        self._adapters = spec.adapters
        self._adapter: LoRARequest | None = None
        """The adapters of the last sync, which requests use."""
        adapters = spec.adapters and (spec.adapters.rank, spec.adapters.alpha)
        self._llm.init_weight_transfer_engine({"init_info": {"link": link, "adapters": adapters}})
        if spec.routing is not None and on_cpu:
            self._llm.collective_rpc("record_routes", args=(spec.routing.layers,))

    def add(self, number: int, request: GenerationRequest) -> None:
        """See `RolloutEngine`."""
        prompt: Any = {"prompt_token_ids": request.prompt_token_ids.tolist()}
        name = self._engine.add_request(
            str(number), prompt, self._sampling_params(request), lora_request=self._adapter
        )
        self._requests[number] = name

    def step(self) -> list[tuple[int, GenerationResult]]:
        """See `RolloutEngine`."""
        outputs: list[Any] = [output for output in self._engine.step() if output.finished]
        ended = self._results(outputs)
        if self._is_part:
            self._check_lockstep(ended)
        return ended

    def abort(self, numbers: Sequence[int]) -> list[tuple[int, GenerationResult]]:
        """See `RolloutEngine`. vLLM gives the tokens of an aborted request only to a queue of its
        own front end; this is the call that makes that output (output_processor.py,
        abort_requests)."""
        names = [self._requests[number] for number in numbers]
        states = [self._engine.output_processor.request_states[name] for name in names]
        outputs: list[Any] = [
            state.make_request_output([], None, FinishReason.ABORT, None) for state in states
        ]
        self._engine.abort_request(names, internal=True)
        return self._results(outputs)

    def _results(self, outputs: Sequence[Any]) -> list[tuple[int, GenerationResult]]:
        """Return the results of requests that have ended, by number, and drop these requests."""
        numbers = [int(output.request_id) for output in outputs]
        names = [self._requests.pop(number) for number in numbers]
        routes = self._routed_experts(names, outputs)
        return [
            (number, self._result(output.outputs[0], experts))
            for number, output, experts in zip(numbers, outputs, routes, strict=True)
        ]

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

    def _routed_experts(
        self, names: Sequence[str], outputs: Sequence[Any]
    ) -> Sequence[np.ndarray | None]:
        """Return the experts of each output's tokens but the last, None where vLLM has none."""
        if self._routing is None or not outputs:
            return [None] * len(outputs)
        if self._on_cpu:
            recorded = self._llm.collective_rpc("take_routes", args=(list(names),))[0]
            found = [recorded.get(name) for name in names]
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
        spans = output.weight_versions or []
        return GenerationResult(
            token_ids=np.array(output.token_ids, np.int32),
            logprobs=np.array(output.logprobs.logprobs, np.float32),
            finish_reason=output.finish_reason or "abort",
            versions=[VersionSpan(int(span.version), span.start, span.end) for span in spans],
            routed_experts=routed_experts,
        )

    def _check_lockstep(self, ended: Sequence[tuple[int, GenerationResult]]) -> None:
        """Raise a RolloutError unless all ranks of the engine drew the same tokens; collective, at
        the end of the last request."""
        for number, result in ended:
            self._drawn.update(repr((number, len(result.token_ids))).encode())
            self._drawn.update(result.token_ids.tobytes())
        if self._requests:
            return
        group = get_tp_group()
        found: list[Any] = [None] * group.world_size
        dist.all_gather_object(found, self._drawn.hexdigest(), group=group.cpu_group)
        if len(set(found)) > 1:
            raise RolloutError(
                f"the ranks {group.ranks} of one engine drew different tokens", role="rollout"
            )

    def any_rank(self, is_so: bool) -> bool:
        """See `RolloutEngine`."""
        if not self._is_part:
            return is_so
        found = torch.tensor(is_so, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=get_tp_group().cpu_group)
        return bool(found)

    def sleep(self, level: int) -> None:
        """See `RolloutEngine`. On CPU vLLM accepts it and frees nothing."""
        self._llm.sleep(level, mode="keep")
        if level > 1:
            self.weight_version = -1

    def wake(self, part: EnginePart) -> None:
        """See `RolloutEngine`."""
        self._llm.wake_up([part.value])

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
        if self._adapters is not None:
            self._take_adapters()
        # The cache of running requests is computed again up to their last token.
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise RolloutError("cached keys and values survived a weight update", role="rollout")
        self.weight_version = self._coming_version

    def _take_adapters(self) -> None:
        """Use the adapters that arrived, under a name of their own; vLLM's finish has removed the
        earlier ones (gpu_worker.py, finish_weight_update)."""
        version = self._coming_version
        adapter = LoRARequest(f"weights {version}", version + 1, "came by a weight sync")
        self._adapter = adapter
        for unbound in self._llm.collective_rpc("take_adapters", args=(adapter,)):
            refuse([f"{name} reached no layer" for name in unbound], version)
        core: Any = self._engine.engine_core
        for request in core.engine_core.scheduler.requests.values():
            request.lora_request = adapter

    def abort_weight_update(self) -> None:
        self.weight_version = -1
        self._llm.collective_rpc("abort_intake")

    def loaded_digests(self) -> list[dict[str, str]]:
        return self._llm.collective_rpc("loaded_digests")

    def digests_of_folder(self, folder: str) -> list[dict[str, str]]:
        self.weight_version = -1
        return self._llm.collective_rpc("load_folder", args=(folder,))

    def close(self) -> None:
        del self._engine, self._llm


def _lora_settings(adapters: EngineAdapters | None) -> dict[str, Any]:
    """Return the arguments for adapters; vLLM takes ranks of some sizes and pads to them."""
    if adapters is None:
        return {}
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(rank for rank in get_args(MaxLoRARanks) if rank >= adapters.rank),
        "lora_target_modules": list(adapters.layers),
    }


def executor(size: int, *, is_apart: bool) -> str:
    """Return how vLLM runs its ranks.

    In the trainer's processes the engine consists of adjacent ranks of the default process group.
    Each takes the device that RANK and LOCAL_RANK give to its process. The executor of a single
    process takes the first visible device, whichever device the trainer has.
    """
    if not is_apart:
        return "external_launcher"
    return "uni" if size == 1 else "mp"


def _remove_shared_memory(engine_size: int) -> None:
    """Remove what a run that was killed has left of an engine of these ranks.

    On CPU vLLM names an engine's shared memory only by its ranks, and does not start if that name
    exists (cpu_communicator.py, make_group_name). A process that uses the memory has it mapped and
    keeps it. The first rank removes it before the others can need it: there is a rendezvous first.
    """
    place, first = dist.get_rank() % engine_size, dist.get_rank() // engine_size * engine_size
    ranks = "-".join(str(first + i) for i in range(engine_size))
    for file in Path("/dev/shm").iterdir() if place == 0 else ():
        if f"[{ranks}]-cpushm" in file.name and file.stat().st_uid == os.getuid():
            file.unlink(missing_ok=True)
