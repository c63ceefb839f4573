"""SwiGLU that keeps its input alone for the backward pass.

Megatron's own, without its compiled fusion, keeps the activation of the gate and a copy of the
other half too, and joins two gradients into a third tensor. This one computes the activation again.
The numbers are the same, bit for bit: the operations are (tested on a CPU).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SwiGLU(MegatronModule):
    """The `activation_func` of a layer spec; `config.use_te_activation_func` has MLPs call it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Return silu(gate) * up, [..., F], of [..., 2 F]."""
        output: Any = _SwiGLU.apply(gate_and_up)
        return output


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        grad = torch.empty_like(ctx.saved_tensors[0])
        of_gate, of_up = grad.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=of_gate)
        return grad
