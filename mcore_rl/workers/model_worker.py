"""What actor and critic have in common: one rank of a model that is trained and saved.

Every method is collective: the launcher calls it on all ranks together. Only small host objects
come in and go out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mcore_rl.data.batch import PackedBatch
from mcore_rl.megatron.checkpoint import (
    PendingSave,
    TrainedWeights,
    begin_save,
    load_checkpoint,
)
from mcore_rl.megatron.forward_backward import forward_backward
from mcore_rl.megatron.model import wrap_for_training
from mcore_rl.megatron.optimizer import PolicyOptimizer
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.megatron.router_replay import Routes, own_routes
from mcore_rl.metrics import Metrics, maximum, mean, total
from mcore_rl.types import Denominators, MicroBatch, WriteState
from mcore_rl.workers.spec import ModelSpec


class TrainObjective(Protocol):
    """What a minibatch minimizes; picklable, since it travels from the controller."""

    @property
    def with_entropy(self) -> bool:
        """Whether the model computes the entropy."""
        ...

    def __call__(
        self,
        output_T: Tensor,
        entropy_T: Tensor | None,
        batch: PackedBatch,
        denominators: Denominators,
        /,
    ) -> tuple[Tensor, Metrics]:
        """Return (sum_T w_T * loss_T over this micro-batch, metrics).

        `output_T` [T] float32 is what the model gives: log-probabilities or values.
        """
        ...


class ModelWorker:
    """One rank of a trained model.

    Args:
        spec: its optimizer and configuration.
        parallel: process groups, initialized.
        device: where this rank's shard lives.
        chunks: this rank's model chunks, weights loaded.
        config: Megatron's config of them.
        trained: what the optimizer trains and a checkpoint holds.
    """

    role: ClassVar[str]
    """First part of its metrics' keys."""

    def __init__(
        self,
        spec: ModelSpec,
        parallel: Parallel,
        device: torch.device,
        chunks: Sequence[Any],
        config: Any,
        trained: TrainedWeights,
    ) -> None:
        self.parallel, self.device = parallel, device
        self.chunks = wrap_for_training(chunks, config, spec.megatron)
        self.optimizer = PolicyOptimizer(
            self.chunks, spec.optim, spec.megatron, spec.grad_clip, spec.total_steps
        )
        self.trained = trained
        self._pending_save: PendingSave | None = None

    def begin_step(self) -> None:
        """Move the learning-rate schedule to the coming step."""
        self.optimizer.advance_schedule()

    def train_on(
        self,
        micro_batches: Sequence[MicroBatch],
        denominators: Denominators,
        objective: TrainObjective,
        routes: Routes = own_routes,
    ) -> Metrics:
        """Do one optimizer update and return its metrics, tensors among them (on ranks that report
        tokens).
        """
        self.optimizer.zero_grad()
        metrics = forward_backward(
            self.chunks,
            micro_batches,
            self.parallel,
            self.device,
            lambda output_T, entropy_T, batch: objective(output_T, entropy_T, batch, denominators),
            denominators.num_tokens,
            objective.with_entropy,
            routes,
        )
        grad_norm, applied = self.optimizer.step()
        if self.parallel.reports_sequences and self.parallel.dp.rank() == 0:
            # The same on every rank: one of them reports.
            metrics[f"{self.role}/num_skipped_updates"] = total(0.0 if applied else 1.0)
            metrics[f"{self.role}/lr"] = maximum(self.optimizer.lr)
            if applied:
                metrics[f"{self.role}/grad_norm"] = mean(grad_norm)
        return metrics

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
