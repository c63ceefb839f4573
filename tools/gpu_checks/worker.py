"""A train worker in this process, with an engine beside it if wanted, as the loop sees them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gpu_checks.outcome import free_memory
from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.group import Call, done
from mcore_rl.cluster.placement import colocated
from mcore_rl.config.run import train_layout
from mcore_rl.data.packing import SequenceCount
from mcore_rl.errors import UserError
from mcore_rl.megatron.config import MegatronConfig, OptimConfig
from mcore_rl.processes import collective_backend
from mcore_rl.rollout.base import EngineSpec, RolloutConfig
from mcore_rl.sockets import Address
from mcore_rl.types import Offloads, Part
from mcore_rl.workers.spec import ActorSpec, WorkerSpec

R = TypeVar("R")


class OneWorker:
    """A `WorkerGroup` of this process alone."""

    world_size = 1
    step: int | None = None

    def __init__(self, worker: Any) -> None:
        self.worker = worker

    def submit(self, calls: Mapping[int, Call[R]]) -> dict[int, Future[R]]:
        answers = {
            rank: self.worker.handlers[call.method](*call.args) for rank, call in calls.items()
        }
        return {
            rank: answer if isinstance(answer, Future) else done(answer)
            for rank, answer in answers.items()
        }

    def restart(self, rank: int) -> Future[None]:
        raise AssertionError("the engine is in this process")

    def update_address(self, rank: int) -> Address:
        raise AssertionError("the engine is in this process")

    def interrupt(self) -> None:
        """Nothing is generated while anything else runs."""

    def close(self) -> None:
        self.worker.close()


@contextlib.contextmanager
def running(
    folder: Path,
    device: torch.device,
    cut: int,
    *,
    engine: Mapping[str, Any] | None = None,
    **megatron: Any,
) -> Iterator[tuple[Cluster, Any]]:
    """Yield the loop's view of one actor, and its worker.

    Args:
        folder: Hugging Face checkpoint.
        device: where it runs.
        cut: sequences of a micro-batch.
        engine: settings of `rollout`, for an engine beside the actor; None: there is none.
        megatron: settings of `actor.megatron`.
    """
    from mcore_rl.models.spec import engine_overrides, load_hf_config, routing
    from mcore_rl.rollout import import_engine
    from mcore_rl.workers.worker import Worker

    if engine is not None:
        import_engine("vllm")  # before Megatron's CPU support, as the process of a worker does
    cfg = MegatronConfig(**megatron)
    actor = ActorSpec(
        model_path=str(folder),
        megatron=cfg,
        # With epsilon 1 an update is proportional to the gradient, so that comparing weights
        # compares gradients.
        optim=OptimConfig(lr=1e-2, eps=1.0),
        grad_clip=1.0,
        total_steps=10,
        temperature=1.0,
        with_reference=False,
    )
    placement = colocated(train_layout(cfg, 1), 1, engine_size=None if engine is None else 1)
    engine_spec, offloads, sleep_level = None, Offloads(), 0
    if engine is not None:
        config = RolloutConfig(**engine)
        sleep_level = config.sleep_level
        if sleep_level:
            offloads = Offloads(actor=frozenset({Part.PARAM, Part.GRAD, Part.OPTIMIZER}))
        engine_spec = EngineSpec(
            model_path=str(folder),
            dtype=cfg.dtype,
            max_model_len=512,
            stop_token_ids=[],
            config=config,
            run_folder=str(folder),
            routing=routing(load_hf_config(str(folder))),
            config_overrides=engine_overrides(str(folder)),
        )
    spec = WorkerSpec(placement=placement, actor=actor, engine=engine_spec, offloads=offloads)
    if not dist.is_initialized():  # vLLM destroys the default group with its engine
        join(device)
    worker = Worker(spec, device)
    group = OneWorker(worker)
    cut_by = SequenceCount(num_sequences=cut)
    try:
        yield (
            Cluster.of(group, placement, cut_by, offloads=offloads, sleep_level=sleep_level),
            worker,
        )
    finally:
        group.close()
        del worker, group
        free_memory(device)


def layers_here(dtype: str) -> list[str]:
    """Return the kinds of layers that can run in this dtype on this machine."""
    from mcore_rl.megatron.block_spec import transformer_impl

    kinds = ["local"]
    with contextlib.suppress(UserError):
        config = MegatronConfig(dtype=dtype, transformer_impl="transformer_engine")
        kinds.append(transformer_impl(config))
    return kinds


def exported(worker: Any) -> dict[str, torch.Tensor]:
    """Return every weight by its Hugging Face name, float32 on the host."""
    return {
        name: tensor.to("cpu", torch.float32, copy=True)
        for bucket in worker.actor.exporter
        for name, tensor in bucket
    }


def join(device: torch.device) -> None:
    """Create a default process group of this process alone, as a launcher does."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": str(device.index or 0), "WORLD_SIZE": "1"}
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(collective_backend(device.type), store=store, rank=0, world_size=1)
