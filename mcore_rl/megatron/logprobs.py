"""Log-probabilities and entropy of given tokens, from hidden states, in chunks.

The output layer is applied to a chunk of tokens at a time and its logits are thrown away, so no
float32 [T, V] exists at any moment, whatever the vocabulary; the backward pass computes the logits
of a chunk again. The vocabulary may be cut over the tensor-parallel group.

    z = h W^T / temperature          logprob[t] = z[t, label] - lse(z[t])
    entropy[t] = lse(z[t]) - sum_v p[t, v] z[t, v]

Shapes: T tokens, C tokens of a chunk, H hidden, V vocabulary, Vt the rows of it on this rank.
`logprobs_reference` is the same without chunks and cuts; the tests compare both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

CHUNK_TOKENS = 1024


def logprobs_reference(
    hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return (logprobs_T, entropy_T), both [T] float32, by the plain formula; for tests."""
    logits_TV = (hidden_TH @ weight_VH.t()).float() / temperature
    logprobs_TV = logits_TV.log_softmax(-1)
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    return logprobs_TV.gather(-1, labels_T.unsqueeze(-1)).squeeze(-1), entropy_T


def vocab_parallel_logprobs(
    hidden_TH: Tensor,
    weight_VtH: Tensor,
    labels_T: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    group: ProcessGroup | None,
    with_entropy: bool,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities of `labels_T` and, if asked for, the entropy at each token.

    The gradient reaches `hidden_TH` and `weight_VtH`. That of the hidden states covers this
    rank's part of the vocabulary only: the caller sums it over the group (Megatron's
    `copy_to_tensor_model_parallel_region` and the sequence-parallel gather do).

    Args:
        hidden_TH: [T, H] float, the same on every rank of the group.
        weight_VtH: [Vt, H] float, this rank's rows of the output weight.
        labels_T: [T] int64, in [0, vocab_size).
        temperature: logits are divided by it, as the rollout engine did.
        vocab_size: V without padding; padded rows are left out of the softmax.
        group: tensor-parallel group; None or one rank when the vocabulary is whole.
        with_entropy: compute the entropy too (its gradient included).
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        logprobs_T [T] float32 and entropy_T [T] float32 or None.
    """
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    rows = weight_VtH.shape[0]
    first = rank * rows
    real_rows = max(0, min(rows, vocab_size - first))
    logprobs_T, entropy_T = _ChunkedLogprobs.apply(
        hidden_TH,
        weight_VtH,
        labels_T - first,
        1.0 / temperature,
        real_rows,
        group if size > 1 else None,
        with_entropy,
        chunk_tokens,
    )  # pyright: ignore[reportGeneralTypeIssues]
    return logprobs_T, entropy_T if with_entropy else None


class _ChunkedLogprobs(torch.autograd.Function):
    """Labels count from this rank's first row; rows past `real_rows` are padding."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VtH: Tensor,
        local_labels_T: Tensor,
        scale: float,
        real_rows: int,
        group: ProcessGroup | None,
        with_entropy: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden_TH.shape[0]
        logprobs_T = hidden_TH.new_empty(num_tokens, dtype=torch.float32)
        lse_T = torch.empty_like(logprobs_T)
        entropy_T = torch.empty_like(logprobs_T) if with_entropy else logprobs_T.new_empty(0)
        real_weight = weight_VtH[:real_rows]
        for chunk in _chunks(num_tokens, chunk_tokens):
            logits_CV = _scaled_logits(hidden_TH[chunk], real_weight, scale)
            label_logit_C = _label_logits(logits_CV, local_labels_T[chunk])
            top_C = (
                logits_CV.amax(-1)
                if real_rows
                else label_logit_C.new_full(label_logit_C.shape, float("-inf"))
            )
            if group is not None:
                dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
            weighted_C = None
            if with_entropy:
                exp_CV = (logits_CV - top_C.unsqueeze(-1)).exp_()
                sum_C = exp_CV.sum(-1)
                weighted_C = exp_CV.mul_(logits_CV).sum(-1)
            else:
                sum_C = logits_CV.sub_(top_C.unsqueeze(-1)).exp_().sum(-1)
            parts = [sum_C, label_logit_C] + ([weighted_C] if weighted_C is not None else [])
            if group is not None:
                stacked = torch.stack(parts)
                dist.all_reduce(stacked, group=group)
                parts = list(stacked.unbind())
            lse_C = top_C + parts[0].log()
            lse_T[chunk] = lse_C
            logprobs_T[chunk] = parts[1] - lse_C
            if with_entropy:
                entropy_T[chunk] = lse_C - parts[2] / parts[0]
        ctx.save_for_backward(hidden_TH, weight_VtH, local_labels_T, lse_T, entropy_T)
        ctx.constants = scale, real_rows, with_entropy, chunk_tokens
        return logprobs_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs_T, grad_entropy_T = grads
        hidden_TH, weight_VtH, local_labels_T, lse_T, entropy_T = ctx.saved_tensors
        scale, real_rows, with_entropy, chunk_tokens = ctx.constants
        real_weight = weight_VtH[:real_rows]
        grad_hidden_TH = torch.empty_like(hidden_TH)
        # Summed over chunks, so in float32 whatever the weight's dtype.
        grad_weight = torch.zeros_like(weight_VtH, dtype=torch.float32)
        entropy_counts = with_entropy and bool(grad_entropy_T.any())
        for chunk in _chunks(hidden_TH.shape[0], chunk_tokens):
            # d logprob / d z = onehot - p;  d entropy / d z = -p (log p + entropy)
            grad_z_CV = _scaled_logits(hidden_TH[chunk], real_weight, scale)
            grad_z_CV -= lse_T[chunk].unsqueeze(-1)
            if entropy_counts:
                factor_CV = grad_z_CV + entropy_T[chunk].unsqueeze(-1)
                factor_CV *= grad_entropy_T[chunk].unsqueeze(-1)
                factor_CV += grad_logprobs_T[chunk].unsqueeze(-1)
                grad_z_CV.exp_().mul_(factor_CV).neg_()
            else:
                grad_z_CV.exp_().mul_(-grad_logprobs_T[chunk].unsqueeze(-1))
            _add_at_labels(grad_z_CV, local_labels_T[chunk], grad_logprobs_T[chunk])
            grad_logits_CV = grad_z_CV.mul_(scale).to(hidden_TH.dtype)
            grad_hidden_TH[chunk] = grad_logits_CV @ real_weight
            grad_weight[:real_rows] += grad_logits_CV.t() @ hidden_TH[chunk]
        grad_weight = grad_weight.to(weight_VtH.dtype)
        return grad_hidden_TH, grad_weight, None, None, None, None, None, None


def _chunks(num_tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(i, i + chunk_tokens) for i in range(0, num_tokens, chunk_tokens)]


def _scaled_logits(hidden_CH: Tensor, weight_VH: Tensor, scale: float) -> Tensor:
    """Return [C, V] float32 logits of one chunk."""
    logits_CV = (hidden_CH @ weight_VH.t()).float()
    return logits_CV if scale == 1.0 else logits_CV.mul_(scale)


def _label_logits(logits_CV: Tensor, local_labels_C: Tensor) -> Tensor:
    """Return [C] the logit of each label, 0 where another rank holds its row."""
    rows = logits_CV.shape[-1]
    held_C = (local_labels_C >= 0) & (local_labels_C < rows)
    if rows == 0:
        return logits_CV.new_zeros(logits_CV.shape[0])
    picked_C = logits_CV.gather(-1, local_labels_C.clamp(0, rows - 1).unsqueeze(-1)).squeeze(-1)
    return torch.where(held_C, picked_C, 0.0)


def _add_at_labels(grad_CV: Tensor, local_labels_C: Tensor, values_C: Tensor) -> None:
    rows = grad_CV.shape[-1]
    if rows == 0:
        return
    held_C = (local_labels_C >= 0) & (local_labels_C < rows)
    index_C1 = local_labels_C.clamp(0, rows - 1).unsqueeze(-1)
    grad_CV.scatter_add_(-1, index_C1, torch.where(held_C, values_C, 0.0).unsqueeze(-1))
