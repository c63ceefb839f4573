"""One rank of the actor: owns model shard and optimizer; its methods are the steps of training.

Every method is collective: the launcher calls it on all ranks together. Only small host objects
come in and go out; weights leave through `export`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.data.batch import PackedBatch
from mcore_rl.megatron.checkpoint import PendingSave, WholeModel, begin_save, load_checkpoint
from mcore_rl.megatron.forward_backward import forward_backward, forward_logprobs
from mcore_rl.megatron.layer_outputs import LayerRecording
from mcore_rl.megatron.lora import LoraAdapters
from mcore_rl.megatron.model import (
    DTYPES,
    build_chunks,
    build_transformer_config,
    freeze_routers,
    load_weights,
    named_local_parameters,
    wrap_for_training,
)
from mcore_rl.megatron.optimizer import PolicyOptimizer
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.megatron.router_replay import ModelRouters
from mcore_rl.metrics import Metrics, maximum, mean, to_host, total
from mcore_rl.models.lora import write_peft_adapter
from mcore_rl.models.safetensors_io import (
    MAX_SHARD_BYTES,
    CheckpointReader,
    begin_checkpoint,
    copy_model_files,
    finish_checkpoint,
    plan_shards,
    write_config_dtype,
    write_shards,
)
from mcore_rl.models.spec import load_hf_config, model_family, routing
from mcore_rl.types import Denominators, MicroBatch, WriteState
from mcore_rl.weight_sync.export import WeightExporter
from mcore_rl.workers.spec import ActorSpec


class TrainObjective(Protocol):
    """What a minibatch minimizes; picklable, since it travels from the controller."""

    @property
    def with_entropy(self) -> bool:
        """Whether the model computes the entropy."""
        ...

    def __call__(
        self,
        logprobs_T: Tensor,
        entropy_T: Tensor | None,
        batch: PackedBatch,
        denominators: Denominators,
    ) -> tuple[Tensor, Metrics]:
        """Return (sum_T w_T * loss_T over this micro-batch, metrics)."""
        ...


class TrainWorker:
    """One rank of the actor.

    Args:
        spec: model, optimizer and their configuration.
        parallel: process groups, initialized.
        device: where this rank's shard lives.
    """

    def __init__(self, spec: ActorSpec, parallel: Parallel, device: torch.device) -> None:
        self.parallel, self.device = parallel, device
        self.model_path = spec.model_path
        self.dtype = DTYPES[spec.megatron.dtype]
        hf_config = load_hf_config(spec.model_path)
        self.entries = model_family(hf_config).entries(hf_config)
        config = build_transformer_config(hf_config, spec.megatron, parallel)
        reader = CheckpointReader(spec.model_path)

        def build() -> list[Any]:
            chunks = build_chunks(hf_config, config, parallel, spec.temperature)
            params = named_local_parameters(chunks, parallel)
            load_weights(params, self.entries, reader, parallel)
            return chunks

        # Without their adapters the weights are those of the reference: no second copy is needed.
        self.reference = build() if spec.with_reference and not spec.lora else None
        chunks = build()
        self.params = named_local_parameters(chunks, parallel)
        self.lora = None
        weights: Mapping[str, Tensor] = self.params
        if spec.lora:
            self.lora = LoraAdapters(
                chunks, self.params, self.entries, spec.lora, parallel, spec.megatron.seed
            )
            weights = self.lora.merged(self.params)
        self.routers = ModelRouters(chunks, routing(hf_config), parallel)
        if spec.megatron.moe_router_freeze:
            freeze_routers(chunks)
        self.chunks = wrap_for_training(chunks, config, spec.megatron)
        self.optimizer = PolicyOptimizer(
            self.chunks, spec.optim, spec.megatron, spec.grad_clip, spec.total_steps
        )
        self.exporter = WeightExporter(weights, self.entries, parallel)
        self.trained = self.lora or WholeModel(chunks, parallel)
        self._pending_save: PendingSave | None = None

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> dict[int, list[float]]:
        """Return logprobs of every token under the current weights, by planned index."""
        with self.routers.replaying(micro_batches) as routes:
            return forward_logprobs(self.chunks, micro_batches, self.parallel, self.device, routes)

    def record_logprobs(
        self, micro_batches: Sequence[MicroBatch]
    ) -> dict[int, tuple[list[float], np.ndarray]]:
        """Return logprobs and, as `Sample.routed_experts`, the experts that the routers chose."""
        with self.routers.recording() as recording:
            logprobs = forward_logprobs(
                self.chunks, micro_batches, self.parallel, self.device, recording
            )
        routes = recording.by_sequence()
        indices = [index for micro_batch in micro_batches for index in micro_batch.indices]
        of_index = dict(zip(indices, routes, strict=True))
        return {index: (values, of_index[index]) for index, values in logprobs.items()}

    def ref_logprobs(self, micro_batches: Sequence[MicroBatch]) -> dict[int, list[float]]:
        """Return logprobs of every token under the reference weights, by planned index.

        The reference chooses its experts by itself, also where the sequences carry routes.
        """
        if self.lora:
            with self.lora.disabled():
                return forward_logprobs(self.chunks, micro_batches, self.parallel, self.device)
        assert self.reference is not None, "built without a reference model"
        return forward_logprobs(self.reference, micro_batches, self.parallel, self.device)

    def layer_outputs(
        self, micro_batches: Sequence[MicroBatch]
    ) -> dict[int, Mapping[str, np.ndarray]]:
        """Return what comes out of this rank's layers under the current weights, by planned index
        and module; see `LayerRecording.by_index`."""
        models = [chunk.module for chunk in self.chunks]
        recording = LayerRecording(models, self.parallel)
        forward_logprobs(self.chunks, micro_batches, self.parallel, self.device, recording)
        return recording.by_index(micro_batches)

    def begin_step(self) -> None:
        """Move the learning-rate schedule to the coming step."""
        self.optimizer.advance_schedule()

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        denominators: Denominators,
        objective: TrainObjective,
    ) -> Metrics:
        """Do one optimizer update and return its metrics (on ranks that report tokens)."""
        self.optimizer.zero_grad()
        with self.routers.replaying(micro_batches) as routes:
            metrics = forward_backward(
                self.chunks,
                micro_batches,
                self.parallel,
                self.device,
                lambda logprobs_T, entropy_T, batch: objective(
                    logprobs_T, entropy_T, batch, denominators
                ),
                denominators.num_tokens,
                objective.with_entropy,
                routes,
            )
        replay_metrics = self.routers.replay_metrics()
        if self.parallel.reports_sequences:
            metrics |= replay_metrics
        grad_norm, applied = self.optimizer.step()
        if self.parallel.reports_sequences and self.parallel.dp.rank() == 0:
            # The same on every rank: one of them reports.
            metrics["actor/num_skipped_updates"] = total(0.0 if applied else 1.0)
            metrics["actor/lr"] = maximum(self.optimizer.lr)
            if applied:
                metrics["actor/grad_norm"] = mean(grad_norm)
        return to_host(metrics)

    def begin_save(self, folder: str) -> None:
        """Copy weights, optimizer and schedule, and begin to write them into `folder`."""
        assert self._pending_save is None, "one checkpoint at a time"
        self._pending_save = begin_save(Path(folder), self.trained, self.optimizer, self.parallel)

    def save_state(self, wait: bool) -> WriteState:
        """Return how far this rank is with writing; with `wait`, when it has come to an end."""
        assert self._pending_save is not None, "begin_save comes first"
        return self._pending_save.state(wait=wait)

    def finish_save(self) -> None:
        """Make what all ranks have written a checkpoint."""
        assert self._pending_save is not None, "begin_save comes first"
        self._pending_save.finish()
        self._pending_save = None

    def load(self, folder: str) -> None:
        """Read back what was saved, in this or another layout."""
        load_checkpoint(Path(folder), self.trained, self.optimizer, self.parallel)

    def export_hf(self, folder: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write the weights as a Hugging Face folder with config and tokenizer.

        Adapters are merged into the weights and also written by themselves, below `adapter`.

        Every rank writes shards of its own into the folder, which all of them must see; the folder
        holds a model when the call is over on all of them.

        Args:
            folder: not there, or empty.
            max_shard_bytes: a rank holds as much in memory, beside the layer that is gathered.
        """
        target = Path(folder)
        shards = plan_shards(self.exporter.outline(), max_shard_bytes)
        tensors = (item for bucket in self.exporter for item in bucket)
        if self.parallel.rank == 0:
            copy_model_files(self.model_path, target)
            write_config_dtype(target, self.dtype)
            begin_checkpoint(target)
        dist.barrier()
        write_shards(target, tensors, shards, self.parallel.rank, self.parallel.layout.world_size)
        if self.lora:
            self._write_adapter(target / "adapter", self.lora)
        dist.barrier()
        if self.parallel.rank == 0:
            finish_checkpoint(target, shards)

    def _write_adapter(self, folder: Path, lora: LoraAdapters) -> None:
        exporter = WeightExporter(lora.params, lora.entries, self.parallel)
        tensors = {name: tensor for bucket in exporter for name, tensor in bucket}
        if self.parallel.rank == 0:
            write_peft_adapter(
                folder,
                lora.adapters,
                tensors,
                base=self.model_path,
                rank=lora.config.rank,
                alpha=lora.config.alpha,
            )
