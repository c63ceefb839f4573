"""One rank of the critic: the model that predicts the expected reward.

It has the actor's layout and routes its tokens by itself, also if the actor replays routes.
"""

from __future__ import annotations

import torch

from mcore_rl.megatron.checkpoint import WholeModel
from mcore_rl.megatron.forward_backward import forward_tokens
from mcore_rl.megatron.model import (
    build_models,
    build_transformer_config,
    freeze_routers,
    load_weights,
    named_local_parameters,
)
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.megatron.value_model import ValueModel
from mcore_rl.metrics import Metrics, to_host
from mcore_rl.models.safetensors_io import CheckpointReader
from mcore_rl.models.spec import load_hf_config
from mcore_rl.models.value_head import OUTPUT_LAYER, value_entries
from mcore_rl.types import Denominators, Part, Share, TokenNumbers
from mcore_rl.workers.model_worker import ModelWorker, TrainObjective, reads
from mcore_rl.workers.roles import Critic
from mcore_rl.workers.spec import ModelSpec
from mcore_rl.workers.spread import spread


class CriticWorker(ModelWorker, Critic):
    """One rank of the critic.

    Args:
        spec: model, optimizer and their configuration.
        parallel: process groups, initialized.
        device: where this rank's shard lives.
    """

    role = "critic"

    def __init__(self, spec: ModelSpec, parallel: Parallel, device: torch.device) -> None:
        hf_config = load_hf_config(spec.model_path)
        config = build_transformer_config(hf_config, spec.megatron, parallel)
        chunks = build_models(hf_config, config, parallel, ValueModel)
        reader = CheckpointReader(spec.model_path)
        entries = value_entries(hf_config, reader)
        self.params = named_local_parameters(chunks, parallel)
        has_head = OUTPUT_LAYER in {entry.megatron_name for entry in entries}
        held = {  # a new head stays at 0
            name: param for name, param in self.params.items() if has_head or name != OUTPUT_LAYER
        }
        load_weights(held, entries, reader, parallel)
        if spec.megatron.moe_router_freeze:
            freeze_routers(chunks)
        super().__init__(spec, parallel, device, chunks, config, WholeModel(chunks, parallel))

    @reads(Part.PARAM)
    def values(self, share: Share | None) -> TokenNumbers:
        """Return the value of every trained token under the current weights."""
        micro_batches = spread(share, self.parallel.share)
        return forward_tokens(self.chunks, micro_batches, self.parallel, self.device)

    def update(
        self,
        share: Share | None,
        denominators: Denominators,
        objective: TrainObjective,
    ) -> Metrics:
        """Do one optimizer update and return its metrics (on ranks that report tokens)."""
        micro_batches = spread(share, self.parallel.share)
        return to_host(self.train_on(micro_batches, denominators, objective))
