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

from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
from mcore_rl.types import MicroBatch

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
) -> dict[int, list[float]]:
    """Return what the model gives for every trained token of every sequence, without gradients:
    log-probabilities of a policy, values of a critic.

    Every rank of the model must call this with the same number of micro-batches. `routes` says
    which experts the routers choose.

    Returns:
        By planned index, a list as long as the sequence's token_ids (0.0 at the first token);
        complete on ranks with `parallel.reports_sequences`, empty elsewhere.
    """
    lists: list[list[float]] = []
    rows = _packed_rows(micro_batches, parallel, device)
    whole_rows = iter(rows)

    def objective(output_L: Tensor, entropy_L: Tensor | None, _: PackedBatch):
        if parallel.reports_tokens:
            row = next(whole_rows)  # the schedule takes micro-batches in order
            boundaries = row.cu_seqlens_padded.tolist()
            lists.extend(unpack(gather_positions(output_L, boundaries, parallel.cp), row))
        return output_L.new_zeros(()), {}

    with torch.no_grad():
        _run_schedule(chunks, rows, parallel, objective, 0, False, True, routes)
    indices = [index for micro_batch in micro_batches for index in micro_batch.indices]
    return dict(zip(indices, lists, strict=True)) if parallel.reports_sequences else {}


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
    rows = _packed_rows(micro_batches, parallel, device)
    metrics = _run_schedule(
        chunks, rows, parallel, objective, num_trained_tokens, with_entropy, False, routes
    )
    return merge(metrics) if parallel.reports_tokens else {}


def _packed_rows(
    micro_batches: Sequence[MicroBatch], parallel: Parallel, device: torch.device
) -> list[PackedBatch]:
    """Return the whole rows, of lengths that context and sequence parallelism can cut."""
    layout = parallel.layout
    return [
        pack(
            micro_batch,
            align_sequence=2 * layout.cp if layout.cp > 1 else 1,
            align_total=layout.tp * layout.cp,
            pad_token_id=PAD_TOKEN_ID,
            device=device,
        )
        for micro_batch in micro_batches
    ]


def _run_schedule(
    chunks: Sequence[torch.nn.Module],
    rows: Sequence[PackedBatch],
    parallel: Parallel,
    objective: Objective,
    num_trained_tokens: int,
    with_entropy: bool,
    forward_only: bool,
    routes: Routes,
) -> list[Metrics]:
    batches = [cut_batch(row, parallel.cp) for row in rows]

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
    iterators = [iter(batches) for _ in chunks]
    several = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=list(chunks) if several else chunks[0],
        num_microbatches=len(batches),
        seq_length=1,  # read only for fixed shapes; stages exchange shapes (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _unwrapped(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def _packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=batch.cu_seqlens_padded,
        cu_seqlens_kv_padded=batch.cu_seqlens_padded,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
