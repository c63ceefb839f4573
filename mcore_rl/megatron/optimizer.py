"""The optimizer: AdamW with float32 masters, clipping, a learning-rate schedule, and a guard.

An update whose gradient norm is not finite is skipped and counted; the weights, the moments and
the step counter stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_rl.dtypes import torch_dtype
from mcore_rl.megatron.config import MegatronConfig, OptimConfig


class PolicyOptimizer:
    """Megatron's optimizer and schedule for the chunks of one model.

    Args:
        chunks: model chunks wrapped for training.
        optim: `actor.optim`.
        megatron: `actor.megatron`.
        grad_clip: largest gradient norm; 0 turns clipping off.
        total_steps: steps of the training, for decaying schedules.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optim: OptimConfig,
        megatron: MegatronConfig,
        grad_clip: float,
        total_steps: int,
    ) -> None:
        dtype = torch_dtype(megatron.dtype)
        self.chunks: list[Any] = list(chunks)
        self.grad_clip = grad_clip
        self.identity: Mapping[str, Any] = {
            "actor.megatron.moe_router_freeze": megatron.moe_router_freeze,
            "actor.megatron.use_distributed_optimizer": megatron.use_distributed_optimizer,
        }
        """By key, what a checkpoint has numbers of depends on."""
        optimizers: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=optim.lr,
                min_lr=optim.min_lr,
                weight_decay=optim.weight_decay,
                adam_beta1=optim.betas[0],
                adam_beta2=optim.betas[1],
                adam_eps=optim.eps,
                clip_grad=0.0,  # `step` clips, with the norm that it has at hand
                bf16=dtype is torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=megatron.use_distributed_optimizer,
            ),
            self.chunks,
            use_gloo_process_groups=False,  # checkpoints gather nothing
        )
        # Where experts alone train (LoRA), the optimizer of all else is empty and cannot be saved.
        parts = [one for one in optimizers.chained_optimizers if one.optimizer is not None]
        self.inner: Any = ChainedOptimizer(parts)
        decay_steps = optim.lr_decay_steps or total_steps
        warmup_steps = max(optim.lr_warmup_steps, 1)
        self.schedule = OptimizerParamScheduler(
            self.inner,
            init_lr=0.0 if optim.lr_warmup_steps else optim.lr,
            max_lr=optim.lr,
            min_lr=optim.min_lr,
            # Without a warmup step 0 has the whole rate, as the last one of a warmup has.
            lr_warmup_steps=warmup_steps,
            # One more: the first step after the decay is the first with `min_lr`, which may be 0.
            # Megatron demands more decay than warmup steps even for a constant rate.
            lr_decay_steps=max(decay_steps, warmup_steps) + 1,
            lr_decay_style=optim.lr_decay_style,
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=max(decay_steps, 1),
            wd_incr_style="constant",
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self.inner.param_groups[0]["lr"])

    def advance_schedule(self) -> None:
        """Move the schedule to the coming step of the loop; call once before its updates.

        Warmup over n steps therefore runs at 1/n, 2/n, ... of the peak rate, and a decay over d
        steps has come to `min_lr` in step d, counted from 0: a run of d steps has d updates.
        """
        self.schedule.step(increment=1)

    def zero_grad(self) -> None:
        """Clear gradients and gradient buffers; call before each minibatch."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    def step(self) -> tuple[float, bool]:
        """Clip and apply the accumulated gradient unless its norm is not finite.

        Returns:
            The gradient norm before clipping, and whether the update was applied. Both are the
            same on every rank, since the norm is reduced over all of them.
        """
        self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if not math.isfinite(norm):
            return norm, False
        if self.grad_clip > 0:
            params = [param for group in self.inner.param_groups for param in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(params, self.grad_clip, torch.tensor(norm))
        self.inner.step_with_ready_grads()
        return norm, True
