"""Log-probabilities and entropy of given tokens, from hidden states, block by block.

The logits of all tokens for a block of the vocabulary exist at one time, at most `BLOCK_LOGITS` of
them however many tokens and whatever the vocabulary. The forward pass carries the largest logit and
the sum of exponentials from block to block; the backward pass computes the blocks again, except the
first `KEPT_BLOCKS` (all of a small model's), and writes every row of the weight's gradient once.
The vocabulary may be cut over the tensor-parallel group.

    z = h W^T / temperature          logprob[t] = z[t, label] - lse(z[t])
    entropy[t] = lse(z[t]) - sum_v p[t, v] z[t, v]

Tokens without a gradient (prompts, clipped ratios, advantages of zero) take no part in the backward
pass.

Shapes: T tokens, H hidden, V vocabulary, Vt the rows of it on this rank, B those of a block.
`logprobs_reference` is the same without blocks and cuts; the tests compare both.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

BLOCK_LOGITS = 2**23
"""32 MiB in float32: few enough for a CPU's last cache, enough for a large matrix product."""
KEPT_BLOCKS = 4
"""Blocks whose logits wait for the backward pass: 128 MiB for each micro-batch under way."""

ALIGN = 128
"""Rows of a large block are a multiple of it: other sizes make slow matrix products."""


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
    block_logits: int = BLOCK_LOGITS,
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
        block_logits: most logits that exist at one time; one row of the vocabulary is the least.

    Returns:
        logprobs_T [T] float32 and entropy_T [T] float32 or None.
    """
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    rows = weight_VtH.shape[0]
    first = rank * rows
    real_rows = max(0, min(rows, vocab_size - first))
    logprobs_T, entropy_T = _BlockedLogprobs.apply(
        hidden_TH,
        weight_VtH,
        labels_T - first,
        1.0 / temperature,
        real_rows,
        group if size > 1 else None,
        with_entropy,
        block_logits,
    )  # pyright: ignore[reportGeneralTypeIssues]
    return logprobs_T, entropy_T if with_entropy else None


class _BlockedLogprobs(torch.autograd.Function):
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
        block_logits: int,
    ) -> tuple[Tensor, Tensor]:
        label_logit_T = hidden_TH.new_zeros(hidden_TH.shape[0], dtype=torch.float32)
        # Over the blocks so far: the largest logit; sum exp(z - top) and sum exp(z - top) z.
        top_T = torch.full_like(label_logit_T, float("-inf"))
        sums_NT = label_logit_T.new_zeros(1 + with_entropy, hidden_TH.shape[0])
        kept_logits = []
        exp_TB = label_logit_T.new_empty(0)
        for block in _blocks(real_rows, hidden_TH.shape[0], block_logits):
            logits_TB = _scaled_logits(hidden_TH, weight_VtH[block], scale)
            index_T1, held_T = _place_in_block(local_labels_T, block)
            label_logit_T += torch.where(held_T, logits_TB.gather(-1, index_T1).squeeze(-1), 0.0)
            new_top_T = torch.maximum(top_T, logits_TB.amax(-1))
            if exp_TB.shape != logits_TB.shape:
                exp_TB = torch.empty_like(logits_TB)  # one memory for all blocks of a size
            torch.sub(logits_TB, new_top_T.unsqueeze(-1), out=exp_TB).exp_()
            sums_NT *= (top_T - new_top_T).exp_()
            sums_NT[0] += exp_TB.sum(-1)
            if with_entropy:
                sums_NT[1] += exp_TB.mul_(logits_TB).sum(-1)
            top_T = new_top_T
            if len(kept_logits) < KEPT_BLOCKS:
                kept_logits.append(logits_TB)
        if group is not None:
            own_top_T = top_T.clone()
            dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
            sums_NT *= (own_top_T - top_T).exp_()
            parts = torch.cat([sums_NT, label_logit_T.unsqueeze(0)])
            dist.all_reduce(parts, group=group)
            sums_NT, label_logit_T = parts[:-1], parts[-1]
        lse_T = top_T + sums_NT[0].log()
        entropy_T = lse_T - sums_NT[1] / sums_NT[0] if with_entropy else lse_T.new_empty(0)
        ctx.save_for_backward(hidden_TH, weight_VtH, local_labels_T, lse_T, entropy_T, *kept_logits)
        ctx.constants = scale, real_rows, block_logits
        ctx.set_materialize_grads(False)
        return label_logit_T - lse_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VtH, local_labels_T, lse_T, entropy_T, *kept_logits = ctx.saved_tensors
        scale, real_rows, block_logits = ctx.constants
        logprob_grad_T, entropy_grad_T = grads  # None where nothing depends on it
        if logprob_grad_T is None:
            logprob_grad_T = torch.zeros_like(lse_T)
        counts_T = logprob_grad_T != 0
        if entropy_grad_T is not None:
            counts_T |= entropy_grad_T != 0
        counted_K = counts_T.nonzero().squeeze(-1)
        hidden_KH, labels_K = hidden_TH[counted_K], local_labels_T[counted_K]
        lse_K1, logprob_grad_K1 = lse_T[counted_K, None], logprob_grad_T[counted_K, None]
        # d logprob / d z = onehot - p;  d entropy / d z = -p (log p + entropy)
        # Factors of a whole token go to its hidden states, which are fewer numbers than its logits:
        # without entropy the product below is with p - onehot.
        if entropy_grad_T is None:
            factor_K1, at_label_K1 = -scale * logprob_grad_K1, torch.ones_like(logprob_grad_K1)
        else:
            factor_K1, at_label_K1 = torch.full_like(logprob_grad_K1, -scale), logprob_grad_K1
        scaled_hidden_KH = (hidden_KH * factor_K1).to(hidden_KH.dtype)
        # Summed over blocks, so in float32 whatever the dtype of the hidden states.
        hidden_grad_KH = torch.zeros_like(hidden_KH, dtype=torch.float32)
        weight_grad_VtH = torch.zeros_like(weight_VtH)
        blocks = _blocks(real_rows, hidden_TH.shape[0], block_logits)
        for block, logits_TB in itertools.zip_longest(blocks, kept_logits):
            if logits_TB is None:
                logits_KB = _scaled_logits(hidden_KH, weight_VtH[block], scale)
            elif len(counted_K) == len(counts_T):
                logits_KB = logits_TB  # not a copy: torch refuses a second backward pass
            else:
                logits_KB = logits_TB[counted_K]
            grad_KB = logits_KB.sub_(lse_K1)
            if entropy_grad_T is None:
                grad_KB.exp_()
            else:
                of_p_KB = grad_KB + entropy_T[counted_K, None]
                of_p_KB.mul_(entropy_grad_T[counted_K, None]).add_(logprob_grad_K1)
                grad_KB.exp_().mul_(of_p_KB)
            index_K1, held_K = _place_in_block(labels_K, block)
            grad_KB.scatter_add_(-1, index_K1, -at_label_K1.where(held_K.unsqueeze(-1), 0.0))
            grad_logits_KB = grad_KB.to(hidden_TH.dtype)
            hidden_grad_KH += grad_logits_KB @ weight_VtH[block]
            torch.mm(grad_logits_KB.t(), scaled_hidden_KH, out=weight_grad_VtH[block])
        hidden_grad_TH = torch.zeros_like(hidden_TH)
        hidden_grad_TH[counted_K] = (hidden_grad_KH * factor_K1).to(hidden_TH.dtype)
        return hidden_grad_TH, weight_grad_VtH, None, None, None, None, None, None


def _blocks(num_rows: int, num_tokens: int, block_logits: int) -> list[slice]:
    """Return slices over the rows of the vocabulary, with the logits of all tokens in a block."""
    size = max(1, block_logits // num_tokens)
    size -= size % ALIGN if size > ALIGN else 0
    return [slice(i, min(i + size, num_rows)) for i in range(0, num_rows, size)]


def _scaled_logits(hidden_TH: Tensor, weight_BH: Tensor, scale: float) -> Tensor:
    """Return [T, B] float32 logits of one block."""
    logits_TB = (hidden_TH @ weight_BH.t()).float()
    return logits_TB if scale == 1.0 else logits_TB.mul_(scale)


def _place_in_block(local_labels_T: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return [T, 1] the column of each label in the block, any one where it has none, and [T]
    whether it has one."""
    column_T = local_labels_T - block.start
    size = block.stop - block.start
    held_T = (column_T >= 0) & (column_T < size)
    return column_T.clamp(0, size - 1).unsqueeze(-1), held_T
