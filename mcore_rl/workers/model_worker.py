"""The common part of actor and critic: one rank of a model that is trained and saved.

Every method is collective: the launcher calls it on all ranks together. Only small host objects
come in and go out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, Protocol, TypeVar

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
from mcore_rl.megatron.offload import (
    Offloadable,
    gradients_of,
    optimizer_tensors,
    parameters_of,
)
from mcore_rl.megatron.optimizer import PolicyOptimizer
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.megatron.router_replay import Routes, own_routes
from mcore_rl.metrics import Metrics, maximum, mean, total
from mcore_rl.types import Denominators, MicroBatch, Part, WriteState
from mcore_rl.workers.spec import ModelSpec

W = TypeVar("W", bound="ModelWorker")
P = ParamSpec("P")
R = TypeVar("R")


def reads(
    *parts: Part,
) -> Callable[[Callable[Concatenate[W, P], R]], Callable[Concatenate[W, P], R]]:
    """Make a method of a worker refuse to run while one of these parts is in host memory."""

    def checked(method: Callable[Concatenate[W, P], R]) -> Callable[Concatenate[W, P], R]:
        @functools.wraps(method)
        def run(self: W, *args: P.args, **kwargs: P.kwargs) -> R:
            for part in parts:
                self.parts[part].check_is_here(method.__name__)
            return method(self, *args, **kwargs)

        return run

    return checked


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

        `output_T` [T] float32 is the model's output: log-probabilities or values.
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
        self.parts: dict[Part, Offloadable] = {}
        """The existing parts that can be moved to host memory."""
        self._add_part(Part.PARAM, lambda: parameters_of(self.chunks))
        self._add_part(Part.GRAD, lambda: gradients_of(self.chunks))
        self._add_part(Part.OPTIMIZER, lambda: optimizer_tensors(self.optimizer.inner, self.chunks))

    def _add_part(self, part: Part, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self.parts[part] = Offloadable(f"{self.role}.{part}", tensors)

    def offload(self, parts: Collection[Part]) -> None:
        """Move these parts of the state to host memory.

        Raises:
            OffloadError: if one is there already or cannot be moved.
        """
        for part in parts:
            self.parts[part].offload()

    def restore(self, parts: Collection[Part]) -> None:
        """Move these parts of the state back to the device.

        Raises:
            OffloadError: if one is there already.
        """
        for part in parts:
            self.parts[part].restore()

    def begin_step(self) -> None:
        """Move the learning-rate schedule to the coming step."""
        self.optimizer.advance_schedule()

    @reads(Part.PARAM, Part.GRAD, Part.OPTIMIZER)
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

    @reads(Part.PARAM, Part.OPTIMIZER)
    def begin_save(self, folder: str) -> None:
        """Copy weights, optimizer and schedule, and begin to write them into `folder`."""
        assert self._pending_save is None, "one checkpoint at a time"
        self._pending_save = begin_save(Path(folder), self.trained, self.optimizer, self.parallel)

    def save_state(self, wait: bool) -> WriteState:
        """Return this rank's state of writing; with `wait`, after the writing has ended."""
        assert self._pending_save is not None, "begin_save comes first"
        return self._pending_save.state(wait=wait)

    def finish_save(self) -> None:
        """Complete the checkpoint from the parts that all ranks have written."""
        assert self._pending_save is not None, "begin_save comes first"
        self._pending_save.finish()
        self._pending_save = None

    @reads(Part.PARAM, Part.OPTIMIZER)
    def load(self, folder: str) -> None:
        """Read back what was saved, in this or another layout."""
        load_checkpoint(Path(folder), self.trained, self.optimizer, self.parallel)
