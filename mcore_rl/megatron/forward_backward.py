"""Run micro-batches through Megatron's schedule: forward only, or forward and backward.

This is the only file that knows how Megatron scales losses. With `calculate_per_token_loss=True`
the three halves are:

* here: `loss = N * sum_T w_T * loss_T` and `num_tokens = trained tokens held by this rank`, where
  `w_T` already holds every denominator of the minibatch and `N` is its number of trained tokens;
* `DistributedDataParallel` sums gradients over data and context parallel ranks (factor 1.0);
* `finalize_model_grads` divides by the sum of `num_tokens` over those ranks, which is `N`.

So the gradient is that of `sum_T w_T * loss_T` over all ranks, however the minibatch was cut, and
Megatron's own per-token terms (MoE, MTP) keep the scale that they expect. `schedules.py` applies
no factor of its own in this mode (forward_step_calc_loss).

Example: sequences of 3 and 1 trained tokens, token-mean, on two ranks. Rank 0 returns
`4 * (l1 + l2 + l3) / 4` and 3, rank 1 returns `4 * l4 / 4` and 1; the sum over ranks divided by
3 + 1 is `(l1 + l2 + l3 + l4) / 4`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mcore_rl.data.batch import PackedBatch, pack, unpack
from mcore_rl.megatron.context_parallel import cut_batch, gather_positions
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.megatron.router_replay import Routes, own_routes
from mcore_rl.metrics import Metrics, merge
from mcore_rl.progress import tick
from mcore_rl.types import MicroBatch, Numbers, TokenNumbers

Objective = Callable[[Tensor, Tensor | None, PackedBatch], tuple[Tensor, Metrics]]
"""(what the model gives [T], entropy_T, batch) -> (sum_T w_T * loss_T over this micro-batch,
metrics)."""

PAD_TOKEN_ID = 0  # any valid token: padding is masked


def forward_tokens(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    parallel: Parallel,
    device: torch.device,
    routes: Routes = own_routes,
) -> TokenNumbers:
    """Return what the model gives for every trained token of every sequence, without gradients:
    log-probabilities of a policy, values of a critic.

    Every rank of the model must call this with the same number of micro-batches. `routes` says
    which experts the routers choose.

    Returns:
        The numbers of all sequences on ranks with `parallel.reports_sequences`, of none elsewhere.
    """
    numbers: list[Numbers] = []
    whole_rows: deque[PackedBatch] = deque()

    def rows() -> Iterator[PackedBatch]:
        for row in _packed_rows(micro_batches, parallel, device):
            if parallel.reports_tokens:
                whole_rows.append(row)
            yield cut_batch(row, parallel.cp)

    def objective(output_L: Tensor, entropy_L: Tensor | None, _: PackedBatch):
        if parallel.reports_tokens:
            row = whole_rows.popleft()  # the schedule takes micro-batches in order
            boundaries = row.cu_seqlens_padded.tolist()
            numbers.append(unpack(gather_positions(output_L, boundaries, parallel.cp), row))
        return output_L.new_zeros(()), {}

    with torch.no_grad():
        _run_schedule(chunks, rows(), len(micro_batches), objective, 0, False, True, routes)
    reported = micro_batches if parallel.reports_sequences else []
    return TokenNumbers(
        indices=_joined([micro_batch.indices for micro_batch in reported], np.int32),
        lengths=_joined([micro_batch.lengths for micro_batch in reported], np.int32),
        numbers=_joined(numbers if reported else [], np.float32),
    )


def _joined(parts: Sequence[np.ndarray], dtype: npt.DTypeLike) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    parallel: Parallel,
    device: torch.device,
    objective: Objective,
    num_trained_tokens: int,
    with_entropy: bool,
    routes: Routes = own_routes,
) -> Metrics:
    """Accumulate the gradient of the minibatch's objective into the chunks' buffers.

    Args:
        chunks: model chunks wrapped for training, gradient buffers zeroed.
        micro_batches: this data-parallel rank's; as many on every rank.
        parallel: process groups.
        device: where the batches go.
        objective: see `Objective`.
        num_trained_tokens: N, over the whole minibatch and all ranks.
        with_entropy: whether the model computes the entropy.
        routes: which experts the routers choose.

    Returns:
        Metrics of this rank's micro-batches; empty where `parallel.reports_tokens` is False.
    """
    rows = (cut_batch(row, parallel.cp) for row in _packed_rows(micro_batches, parallel, device))
    metrics = _run_schedule(
        chunks,
        rows,
        len(micro_batches),
        objective,
        num_trained_tokens,
        with_entropy,
        False,
        routes,
    )
    return merge(metrics) if parallel.reports_tokens else {}


def _packed_rows(
    micro_batches: Sequence[MicroBatch], parallel: Parallel, device: torch.device
) -> Iterator[PackedBatch]:
    """Yield the whole rows, of lengths that context and sequence parallelism can cut; each is
    packed when the schedule comes to it."""
    layout = parallel.layout
    for micro_batch in micro_batches:
        yield pack(
            micro_batch,
            align_sequence=2 * layout.cp if layout.cp > 1 else 1,
            align_total=layout.tp * layout.cp,
            pad_token_id=PAD_TOKEN_ID,
            device=device,
        )


def _run_schedule(
    chunks: Sequence[torch.nn.Module],
    rows: Iterator[PackedBatch],
    num_micro_batches: int,
    objective: Objective,
    num_trained_tokens: int,
    with_entropy: bool,
    forward_only: bool,
    routes: Routes,
) -> list[Metrics]:
    def forward_step(iterator: Iterator[PackedBatch], model: torch.nn.Module):
        tick()
        batch = next(iterator)
        inner = _unwrapped(model)
        inner.with_entropy = with_entropy
        with routes(inner, batch):
            output = model(
                batch.input_ids_T.unsqueeze(0),
                batch.position_ids_T.unsqueeze(0),
                None,
                labels=batch.labels_T,
                packed_seq_params=_packed_seq_params(batch),
            )

        def loss(output: tuple[Tensor, Tensor | None]):
            value, metrics = objective(*output, batch)
            num_tokens = batch.mask_T.sum().to(torch.int)
            return value * num_trained_tokens, num_tokens, metrics

        return output, loss

    for chunk in chunks:
        chunk.train(not forward_only)
    several = len(chunks) > 1
    # Every chunk takes all rows, in its own time.
    iterators = list(itertools.tee(rows, len(chunks)))
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=list(chunks) if several else chunks[0],
        num_microbatches=num_micro_batches,
        seq_length=1,  # read only for fixed shapes; stages exchange shapes (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def _packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    """Return the boundaries of the padded sequences as all four of Megatron's.

    Padding follows the tokens of a sequence, so causal attention lets none of them see it.
    Transformer Engine compares the boundaries as objects, not as numbers: two tensors mean padding
    between sequences to it, for which only Hopper's fused attention is left
    (dot_product_attention.py of 2.20).
    """
    boundaries = batch.cu_seqlens_padded
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=boundaries,
        cu_seqlens_kv_padded=boundaries,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
