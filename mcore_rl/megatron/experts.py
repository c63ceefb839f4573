"""The experts of a rank: on CUDA their matrix products together, their weights apart.

Megatron's local layers call one expert after the other. On CUDA that is a dozen small kernels for
each; here all rows pass one MLP with two grouped products of torch. Parameters and their names are
those of Megatron's layer, so checkpoints, exports and adapters see no change.

On a CPU the loop is faster: an expert's rows stay in the cache, and torch's grouped product takes
all weights as one tensor, a copy (`benchmarks/experts.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

_ALIGNMENT = 8
"""torch's grouped product takes rows of a multiple of 16 bytes: 8 numbers of bfloat16."""


class GroupedExperts(SequentialMLP):
    """Megatron's local experts; with grouped matrix products where torch has them as one kernel.

    Experts are called one after the other, as Megatron does, on a CPU, in other types than
    bfloat16, where something hangs on a single expert's layer (an adapter, any hook), and where an
    option of Megatron treats experts one by one.
    """

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the experts' outputs, [rows, H], and no bias.

        Args:
            permuted_local_hidden_states: [rows, H], sorted by expert.
            tokens_per_expert: int, [experts of this rank], rows of each.
            permuted_probs: [rows], the weight of each row's expert.
        """
        rows = permuted_local_hidden_states
        has_kernel = rows.is_cuda and rows.dtype == torch.bfloat16 and len(rows) > 0
        if has_kernel and self.can_be_grouped():
            return self.grouped(rows, tokens_per_expert, permuted_probs)
        return super().forward(rows, tokens_per_expert, permuted_probs)

    def can_be_grouped(self) -> bool:
        """Whether nothing but its weights tells an expert from another."""
        config: Any = self.config
        one_by_one = (
            config.add_bias_linear,
            config.fp8,
            config.fp4,
            config.gradient_accumulation_fusion,
            config.moe_apply_probs_on_input,
        )
        modules = [module for expert in self.local_experts for module in expert.modules()]
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        sizes = [size for layer in self._layers(0) for size in layer.weight.shape]
        aligned = all(size % _ALIGNMENT == 0 for size in sizes)
        return aligned and not hooked and not any(one_by_one)

    def grouped(
        self, rows: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return what `forward` does, by grouped products on any device and in any type."""
        ends = tokens_per_expert.cumsum(0).to(rows.device, torch.int32)
        layers = [self._layers(expert) for expert in range(self.num_local_experts)]
        fc1, fc2 = (
            _GroupedLinear([layer.weight for layer in same], ends)
            for same in zip(*layers, strict=True)
        )
        first: Any = self.local_experts[0]
        together = SimpleNamespace(
            config=self.config,
            activation_func=first.activation_func,
            linear_fc1=fc1,
            linear_fc2=fc2,
        )
        mlp: Any = MLP  # its forward reads no more of an MLP than that
        return mlp.forward(together, rows, probs)

    def _layers(self, expert: int) -> tuple[Any, Any]:
        mlp: Any = self.local_experts[expert]
        return mlp.linear_fc1, mlp.linear_fc2


class _GroupedLinear(torch.nn.Module):
    """A linear layer whose weight depends on the row. It has no parameters, it borrows them."""

    def __init__(self, weights: Sequence[Tensor], ends: Tensor) -> None:
        super().__init__()
        self._weights, self._ends = tuple(weights), ends

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        return grouped_product(rows, self._weights, self._ends), None


def grouped_product(rows: Tensor, weights: Sequence[Tensor], ends: Tensor) -> Tensor:
    """Return each row times the transposed weight of its group, [N, out].

    torch's product takes the weights of all groups as one tensor, a copy. It is made again in the
    backward pass: kept until then, it would take as much memory as all experts of the model.

    Args:
        rows: [N, in], sorted by group; on CUDA bfloat16.
        weights: of each group, [out, in].
        ends: int32, [groups], the rows of all groups up to and including each.
    """
    product: Any = _GroupedProduct.apply(rows, ends, *weights)
    return product


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, ends, *weights)
        return F.grouped_mm(rows, torch.stack(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, ends, *weights = ctx.saved_tensors
        grad = grads[0].contiguous()  # the kernel takes no strides of 0
        wants_rows, _, *wants = ctx.needs_input_grad
        of_rows = F.grouped_mm(grad, torch.stack(weights), offs=ends) if wants_rows else None
        if not any(wants):
            return of_rows, None, *(None for _ in wants)
        return of_rows, None, *F.grouped_mm(grad.t(), rows, offs=ends).unbind()
