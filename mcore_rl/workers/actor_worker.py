"""One rank of the actor: log-probabilities, updates, and the weights for engines and exports.

Every method is collective: the launcher calls it on all ranks together. Only small host objects
come in and go out; weights leave through `export`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mcore_rl.dtypes import torch_dtype
from mcore_rl.megatron.checkpoint import WholeModel
from mcore_rl.megatron.forward_backward import forward_tokens
from mcore_rl.megatron.layer_outputs import LayerRecording
from mcore_rl.megatron.lora import LoraAdapters
from mcore_rl.megatron.model import (
    build_chunks,
    build_transformer_config,
    freeze_routers,
    load_weights,
    named_local_parameters,
)
from mcore_rl.megatron.offload import parameters_of
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.megatron.router_replay import ModelRouters
from mcore_rl.metrics import Metrics, to_host
from mcore_rl.model_files import published_name
from mcore_rl.models.lora import peft_names, write_peft_adapter
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
from mcore_rl.types import Denominators, Part, RoutesAt, Share, TokenNumbers
from mcore_rl.weight_sync.export import AdapterExporter, WeightExporter
from mcore_rl.workers.model_worker import ModelWorker, TrainObjective, reads
from mcore_rl.workers.roles import Actor
from mcore_rl.workers.routes import RouteStore
from mcore_rl.workers.spec import ActorSpec
from mcore_rl.workers.spread import spread


class ActorWorker(ModelWorker, Actor):
    """One rank of the actor.

    Args:
        spec: model, optimizer and their configuration.
        parallel: process groups, initialized.
        device: where this rank's shard lives.
    """

    role = "actor"

    def __init__(self, spec: ActorSpec, parallel: Parallel, device: torch.device) -> None:
        self.model_path = spec.model_path
        self.dtype = torch_dtype(spec.megatron.dtype)
        hf_config = load_hf_config(spec.model_path)
        self.entries = model_family(hf_config).entries(hf_config)
        config = build_transformer_config(hf_config, spec.megatron, parallel)
        reader = CheckpointReader(spec.model_path)

        def build() -> list[Any]:
            chunks = build_chunks(hf_config, config, parallel, spec.temperature)
            params = named_local_parameters(chunks, parallel)
            load_weights(params, self.entries, reader, parallel)
            return chunks

        self.reference = build() if spec.with_reference else None
        chunks = build()
        params = named_local_parameters(chunks, parallel)
        self.lora, weights = None, params
        if spec.lora:
            self.lora = LoraAdapters(
                chunks, params, self.entries, spec.lora, parallel, spec.megatron.seed
            )
            weights = self.lora.merged(params)
        self.routers = ModelRouters(chunks, routing(hf_config), parallel)
        self.routes = RouteStore(self.routers.routing, parallel)
        if spec.megatron.moe_router_freeze:
            freeze_routers(chunks)
        saved = self.lora or WholeModel(chunks, parallel)
        super().__init__(spec, parallel, device, chunks, config, saved)
        if self.reference:
            frozen = self.reference
            self._add_part(Part.REFERENCE, lambda: parameters_of(frozen))
        else:  # under adapters the reference is the weights without them
            self.parts[Part.REFERENCE] = self.parts[Part.PARAM]
        self.params = params
        self.exporter = WeightExporter(self._readable(weights), self.entries, parallel)

    def _readable(self, weights: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return self.parts[Part.PARAM].while_here("the export of weights", weights)

    def separate_exporters(self) -> tuple[WeightExporter, AdapterExporter]:
        """Return the exporters of the weights without adapters and of the adapters; collective."""
        assert self.lora is not None, "built without adapters"
        base = WeightExporter(self._readable(self.params), self.entries, self.parallel)
        halves = WeightExporter(self._readable(self.lora.params), self.lora.entries, self.parallel)
        return base, AdapterExporter(halves, peft_names(self.lora.adapters))

    @reads(Part.PARAM)
    def logprobs(self, share: Share | None) -> TokenNumbers:
        """Return logprobs of every token under the current weights."""
        micro_batches = spread(self.routes.filled(share), self.parallel.share)
        with self.routers.replaying(micro_batches) as routes:
            return forward_tokens(self.chunks, micro_batches, self.parallel, self.device, routes)

    @reads(Part.PARAM)
    def record_logprobs(self, share: Share | None) -> tuple[TokenNumbers, Mapping[int, RoutesAt]]:
        """Return logprobs and, on the rank that received the share, where the routes of its
        sequences are, by planned index. Routes are the experts that the routers chose."""
        micro_batches = spread(share, self.parallel.share)
        with self.routers.recording() as recording:
            logprobs = forward_tokens(
                self.chunks, micro_batches, self.parallel, self.device, recording
            )
        routes = recording.routes()
        if share is None:
            return logprobs, {}
        *parts, _ = np.split(routes, np.cumsum(share.whole.lengths - 1))
        indices = share.whole.indices.tolist()
        kept = {index: self.routes.keep(part) for index, part in zip(indices, parts, strict=True)}
        return logprobs, kept

    @reads(Part.REFERENCE)
    def ref_logprobs(self, share: Share | None) -> TokenNumbers:
        """Return logprobs of every token under the reference weights.

        The reference chooses its experts by itself, also where the sequences carry routes.
        """
        micro_batches = spread(share, self.parallel.share)
        if self.lora:
            with self.lora.disabled():
                return forward_tokens(self.chunks, micro_batches, self.parallel, self.device)
        assert self.reference is not None, "built without a reference model"
        return forward_tokens(self.reference, micro_batches, self.parallel, self.device)

    @reads(Part.PARAM)
    def layer_outputs(self, share: Share | None) -> dict[int, Mapping[str, np.ndarray]]:
        """Return the outputs of this rank's layers under the current weights, by planned index and
        module; see `LayerRecording.by_index`."""
        micro_batches = spread(share, self.parallel.share)
        models = [chunk.module for chunk in self.chunks]
        recording = LayerRecording(models, self.parallel)
        forward_tokens(self.chunks, micro_batches, self.parallel, self.device, recording)
        return recording.by_index(micro_batches)

    def update(
        self,
        share: Share | None,
        denominators: Denominators,
        objective: TrainObjective,
    ) -> Metrics:
        """Do one optimizer update and return its metrics (on ranks that report tokens)."""
        micro_batches = spread(self.routes.filled(share), self.parallel.share)
        with self.routers.replaying(micro_batches) as routes:
            metrics = self.train_on(micro_batches, denominators, objective, routes)
        replay_metrics = self.routers.replay_metrics()
        if self.parallel.reports_sequences:
            metrics |= replay_metrics
        return to_host(metrics)

    @reads(Part.PARAM)
    def export_hf(self, folder: str, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write the weights as a Hugging Face folder with config and tokenizer.

        Adapters are merged into the weights and also written by themselves, below `adapter`.

        Every rank writes its own shards into the folder, which all ranks must be able to reach. The
        folder holds a complete model when the call has returned on all of them.

        Args:
            folder: does not exist, or is empty.
            max_shard_bytes: a rank holds so much in memory, plus the layer being gathered.
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
                base=published_name(self.model_path),
                rank=lora.config.rank,
                alpha=lora.config.alpha,
            )
