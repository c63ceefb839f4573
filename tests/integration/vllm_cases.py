"""What runs in the process that holds real vLLM engines; the tests ask for it by name.

One process serves all tests: importing vLLM takes seconds, an engine starts in three. It holds one
engine at a time, beside a gloo group, as a train worker does.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist

from mcore_rl.errors import RunError, WeightSyncError
from mcore_rl.models.mappings import hf_shapes
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import engine_overrides, load_hf_config, model_family, routing
from mcore_rl.rollout.base import EnginePart, EngineSpec, GenerationRequest, RolloutConfig
from mcore_rl.rollout.hosts.in_process import InProcessEngine
from mcore_rl.rollout.serving import ServingEngine
from mcore_rl.weight_sync.base import (
    TRANSPORTS,
    Deliver,
    Distance,
    Link,
    NamedTensors,
    Sender,
    Transport,
)
from mcore_rl.weight_sync.direct import DirectReceiver, DirectSender
from mcore_rl.weight_sync.packing import PackedBucket
from mcore_rl.weight_sync.sync import sync_one

_engine: InProcessEngine | None = None
_sender: Sender[Any] | None = None


def start(
    folder: str, stop_token_ids=(), with_routes=False, run_folder="", adapters=None, **rollout
) -> None:
    """Start an engine for the model in `folder`, in place of the one before."""
    global _engine, _sender
    stop()
    if "noting" not in TRANSPORTS:  # here, so that the process of the tests does not know it
        ends = {"sender": DirectSender, "receiver": NotingReceiver}
        TRANSPORTS.add("noting", Transport(**ends, reaches=frozenset(Distance)))
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(
            "gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=60)
        )
    config = RolloutConfig(**{"kv_cache_memory_bytes": 32 << 20, **rollout})
    link = Link(transport=config.transport, run_folder=run_folder, engine=0, engine_rank=0)
    _sender = link.open_sender()
    _engine = InProcessEngine(
        EngineSpec(
            model_path=folder,
            dtype="float32",
            max_model_len=256,
            stop_token_ids=list(stop_token_ids),
            routing=routing(load_hf_config(folder)) if with_routes else None,
            config_overrides=engine_overrides(folder),
            config=config,
            run_folder=run_folder,
            adapters=adapters,
        ),
        link,
    )


def stop() -> None:
    """Close the engine, if there is one."""
    global _engine, _sender
    if _engine is not None:
        _engine.close()
    if _sender is not None:
        _sender.close()
    _engine = _sender = None
    gc.collect()  # an engine that goes later takes the default group of its successor with it


class NotingReceiver(DirectReceiver):
    """Writes down what vLLM's worker asks of it."""

    notes: ClassVar[list[str]] = []

    def __init__(self, link):
        super().__init__(link)
        self.notes.append(f"opened for rank {link.engine_rank} of engine {link.engine}")

    def begin(self, version):
        self.notes.append(f"begin {version}")

    def receive(self, update, load):
        super().receive(update, load)
        self.notes.append(update.named_tensors[0][0])

    def end(self):
        self.notes.append("end")

    def close(self):
        self.notes.append("close")


def take_notes() -> list[str]:
    """Return what was asked of receivers of the transport `noting` since the last call."""
    notes, NotingReceiver.notes[:] = list(NotingReceiver.notes), []
    return notes


def engine() -> Any:
    assert _engine is not None, "no engine was started"
    return _engine


def buckets(folder: str):
    """Yield the tensors of a checkpoint as the trainer exports them: in layer order, by layer."""
    config = load_hf_config(folder)
    reader = CheckpointReader(folder)
    entries = model_family(config).entries(config)
    for _, layer in itertools.groupby(entries, key=lambda entry: entry.layer):
        yield [(name, reader.read(name)) for entry in layer for name in hf_shapes(entry)]


def sync(folder: str, version: int, with_digests: bool = False) -> None:
    """Give the engine the weights in `folder` as a train worker does."""
    assert _sender is not None
    sync_one(buckets(folder), _sender, engine(), version, with_digests)


def sync_in_one_piece(folder: str, version: int) -> list[str]:
    """Sync as `sync` does with the tensors of a layer one behind the other in memory, overwrite
    that, and return which layers had weights copied nevertheless."""
    from mcore_rl.rollout import vllm_loading

    assert _sender is not None
    in_place: Any = vllm_loading._InPlace
    buffers, copied, find = [], [], in_place.whole

    def in_one_piece():
        for bucket in buckets(folder):
            packed = PackedBucket.of(bucket)
            buffers.append(torch.empty(packed.num_bytes, dtype=torch.uint8))
            packed.write(bucket, buffers[-1])
            yield packed.read(buffers[-1])

    def note(loader, param):
        whole = find(loader, param)
        if whole is None and not param.is_meta:
            copied.append(type(loader._layer).__name__)
        return whole

    in_place.whole = note
    try:
        sync_one(in_one_piece(), _sender, engine(), version)
    finally:
        in_place.whole = find
    for buffer in buffers:
        buffer.fill_(255)
    return copied


def sync_adapters(
    halves: dict[str, torch.Tensor], version: int, folder: str | None = None, fault: str = ""
) -> str:
    """Give the engine adapters by PEFT's names, behind the weights in `folder` if it is given;
    return why they are refused."""
    assert _sender is not None
    export = [*(buckets(folder) if folder else ()), list(halves.items())]
    sender = _Falsified(partial(_at_fault, fault, next(iter(halves)))) if fault else _sender
    try:
        sync_one(export, sender, engine(), version)
    except WeightSyncError as error:
        return str(error)
    return ""


def adapter_names() -> list[list[int]]:
    """Return the numbers of the adapters that vLLM's workers hold."""
    return [sorted(found) for found in engine()._engine._llm.collective_rpc("list_loras")]


def _at_fault(fault: str, name: str, bucket: NamedTensors) -> NamedTensors:
    if fault == "lost":
        return [(own, tensor) for own, tensor in bucket if own != name]
    changed = [(own, tensor.clone()) for own, tensor in bucket]
    for own, tensor in changed:
        if own == name:
            tensor.view(-1).view(torch.uint8)[5] ^= 4
    return changed


class _Falsified(Sender[Any]):
    """Sends what a function makes of the tensors."""

    def __init__(self, falsify: Callable[[NamedTensors], NamedTensors]) -> None:
        assert _sender is not None
        super().__init__(_sender.link)
        self._falsify = falsify

    def send(self, bucket: NamedTensors, deliver: Deliver[Any]) -> None:
        assert _sender is not None
        _sender.send(self._falsify(bucket), deliver)


def sync_falsified(folder: str, version: int, fault: str, name: str) -> str:
    """Sync as `sync` does, with a fault in the tensor called `name`; return why it was refused."""

    def falsify(bucket: NamedTensors) -> NamedTensors:
        if fault == "bucket lost":
            return [] if name in dict(bucket) else bucket
        if fault == "swapped":
            tensors, other = dict(bucket), name.replace(".0.gate", ".1.gate")
            if name in tensors:
                tensors[name], tensors[other] = tensors[other], tensors[name]
            return list(tensors.items())
        return _at_fault(fault, name, bucket)

    try:
        sync_one(buckets(folder), _Falsified(falsify), engine(), version)
    except WeightSyncError as error:
        return str(error)
    return ""


def refusal_of(function: Callable[..., Any], *args: Any) -> str:
    """Return why a call is refused."""
    try:
        function(*args)
    except RunError as error:
        return str(error)
    return ""


def loaded_digests() -> list[dict[str, str]]:
    return engine().loaded_digests()


def digests_of_folder(folder: str) -> list[dict[str, str]]:
    return engine()._engine.digests_of_folder(folder)


def own_checksums() -> dict[str, str]:
    """Return what vLLM's own checksums say of the engine's parameters."""
    return engine()._engine._llm.collective_rpc("compute_weight_checksums")[0]


def generate(requests: list[GenerationRequest]):
    """Return the results of the engine."""
    return engine().submit([requests])[0].result()


def generate_and_watch(requests: list[GenerationRequest]):
    """Return the results, and how many requests were preempted, how many prompts were cut into
    chunks and how many tokens were found in the cache."""
    runner = engine()._engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    runner = runner.worker.model_runner
    inner, seen = runner.execute_model, {"preempted": 0, "cut": 0, "cached": 0}

    def execute_model(scheduled, *args):
        seen["preempted"] += len(scheduled.preempted_req_ids or ())
        for request in scheduled.scheduled_new_reqs:
            rest = len(request.prompt_token_ids) - request.num_computed_tokens
            seen["cut"] += scheduled.num_scheduled_tokens[request.req_id] < rest
            seen["cached"] += request.num_computed_tokens
        return inner(scheduled, *args)

    runner.execute_model = execute_model
    try:
        return generate(requests), seen
    finally:
        runner.execute_model = inner


def generate_and_sleep(requests: list[GenerationRequest], every: int):
    """Return the results of an engine that sleeps after so many steps, and how often it did."""
    [future] = ServingEngine.submit(engine(), [requests])
    num_sleeps = 0
    while not future.done():
        for _ in range(every):
            if engine().is_busy:
                engine().run()
        engine().sleep(1)
        assert not engine().is_busy
        engine().wake(EnginePart.WEIGHTS)
        assert not engine().is_busy
        engine().wake(EnginePart.KV_CACHE)
        num_sleeps += 1
    return future.result(), num_sleeps


def start_update() -> None:
    """Open an update session and leave it open."""
    engine().start_weight_update(7)


def weight_version() -> int:
    return engine().weight_version


def set_random_states(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_draws() -> tuple[float, float, float]:
    """Return the next number of each global random state."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def thread_state() -> tuple[str, int]:
    """Return whose function sets torch's threads, and how many there are."""
    return torch.set_num_threads.__module__ or "torch", torch.get_num_threads()


def device_taken(rank: int, local_rank: int, *, is_apart: bool) -> tuple[int, int]:
    """Return the (rank, number of the device) that vLLM takes for an engine of one device in a
    process that was told these; asked of vLLM's own executor, which starts nothing here."""
    from types import SimpleNamespace

    from vllm.v1.executor import Executor

    from mcore_rl.rollout.vllm_engine import executor

    backend = executor(1, is_apart=is_apart)
    parallel = SimpleNamespace(distributed_executor_backend=backend)
    kind: Any = Executor.get_class(SimpleNamespace(parallel_config=parallel))  # pyright: ignore
    own = object.__new__(kind)
    own.vllm_config = SimpleNamespace(device_config=SimpleNamespace(device=torch.device("cuda")))
    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK")}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
    try:
        return own._distributed_args()[1:]
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def second_rank_keeps_routes() -> tuple[bool, bool]:
    """Return whether the second rank of an engine has what experts are collected by, in vLLM by
    itself and after `keep_routes_on_every_rank`; everything but that decision is a stand-in."""
    from types import SimpleNamespace
    from unittest import mock

    import vllm.distributed.aux_output_connector.worker as worker

    from mcore_rl.rollout import vllm_routes

    def is_kept() -> bool:
        config = mock.MagicMock()
        config.aux_output_config.max_bytes = 1 << 20
        config.scheduler_config.max_num_seqs = config.max_concurrent_batches = 2
        config.scheduler_config.max_num_batched_tokens = 8
        capturer = SimpleNamespace(shape_per_token=(1, 2), output_dtype_name="uint8")
        with (
            mock.patch.object(worker, "RoutedExpertsCapturer", return_value=capturer),
            mock.patch.object(worker, "bind_routed_experts_capturer"),
            mock.patch.object(worker, "resolve_kv_cache_block_sizes", return_value=(4, 4)),
        ):
            connector = worker.AuxOutputWorkerConnector(
                vllm_config=config, model=mock.MagicMock(), kv_cache_config=mock.MagicMock()
            )
        has_both = None not in (connector._store, connector._buffer)
        connector.close()
        return has_both

    second = SimpleNamespace(is_first_rank=False)
    with (
        mock.patch.object(worker, "get_tp_group", return_value=second),
        mock.patch.object(vllm_routes, "get_tp_group", return_value=second),
    ):
        by_itself = is_kept()
        vllm_routes.keep_routes_on_every_rank()
        return by_itself, is_kept()
