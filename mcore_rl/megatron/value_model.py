"""The critic's model: a language model whose output layer gives one number per position.

The value at a position is that of the state in which the next token is chosen, so values and
log-probabilities of a row stand at the same positions.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ValueHead(torch.nn.Module):
    """From hidden states to values, in float32; every tensor-parallel rank holds all of it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        weight: Any = torch.nn.Parameter(
            torch.zeros(
                1,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),  # "cpu" without one: megatron/cpu.py
            )
        )
        # Under sequence parallelism each rank sees a part of the row, so Megatron is to sum the
        # gradients over the tensor-parallel ranks; otherwise they are equal.
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Return values_T [T] float32 of `hidden` [T, 1, H], or [T / tp, 1, H] when it is cut."""
        values_T = torch.nn.functional.linear(hidden.float(), self.weight.float()).flatten()
        if self.sequence_parallel:
            # What follows is the same on every rank, so the gradient is cut and not summed.
            values_T = tensor_parallel.gather_from_sequence_parallel_region(
                values_T, tensor_parallel_output_grad=False
            )
        return values_T


class ValueModel(GPTModel):
    """GPTModel whose last stage returns (values_T [T] float32, None)."""

    def __init__(self, **kwargs: Any) -> None:
        # A head is not the embedding, also where the language model ties the two.
        super().__init__(**{**kwargs, "share_embeddings_and_output_weights": False})
        if self.post_process:
            self.output_layer = ValueHead(self.config)

    def _postprocess(self, hidden_states, *args, **kwargs):
        """Replace GPTModel._postprocess: hidden states between stages, values at the end."""
        return (self.output_layer(hidden_states), None) if self.post_process else hidden_states
