"""The core attention of the local spec: causal, grouped-query, over packed sequences ("thd").

Torch's scaled-dot-product attention serves every device and dtype; torch's flash attention over
sequences of varying lengths serves half precision on CUDA, without padding. Under context
parallelism queries stay where they are, and keys and values of the whole row are gathered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mcore_rl.megatron.context_parallel import gather_positions, row_boundaries
from mcore_rl.megatron.versions import GROUPED_FLASH_ARGUMENTS


class PackedAttention(MegatronModule):
    """Causal attention within each sequence of a packed row; the `core_attention` of the spec."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        assert not config.attention_dropout, "attention dropout is not implemented here"
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)
        self.cp_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Return [L, heads * d], attention within each packed sequence.

        `query` is [L, heads, d], `key` and `value` are [L, groups, d], of any float dtype; L is
        this rank's part of the row. Under latent attention `value` has a d of its own.
        `packed_seq_params` holds the boundaries of the whole row ("thd" format). The
        signature is Megatron's.
        """
        assert packed_seq_params is not None and attention_mask is None, "packed rows only"
        padded = packed_seq_params.cu_seqlens_q_padded
        given: Any = packed_seq_params.cu_seqlens_q if padded is None else padded
        boundaries = row_boundaries(given)
        if self.cp_group.size() > 1:
            both = torch.cat([key, value], dim=-1)
            sizes = key.shape[-1], value.shape[-1]
            key, value = gather_positions(both, boundaries, self.cp_group).split(sizes, dim=-1)
        spans = causal_spans(boundaries, self.cp_group.rank(), self.cp_group.size())
        has_kernel = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        attend = packed_flash_attention if has_kernel else packed_causal_attention
        return attend(query, key, value, spans, self.scale).flatten(-2)


class Span(NamedTuple):
    """Neighbouring queries and the keys up to and including that of the last query."""

    queries: range
    """Positions in this rank's part of the row."""
    keys: range
    """Positions in the whole row, from the first of the sequence on; at least as many."""


def causal_spans(boundaries: Sequence[int], rank: int = 0, size: int = 1) -> list[Span]:
    """Return what each run of this rank's queries sees, in order.

    Args:
        boundaries: cumulative lengths of the whole row's sequences, first 0, last T.
        rank: in the context-parallel group; see `context_parallel` for the positions it holds.
        size: ranks of that group.
    """
    spans = []
    for start, stop in itertools.pairwise(boundaries):
        if size == 1:
            spans.append(Span(range(start, stop), range(start, stop)))
            continue
        chunk = (stop - start) // (2 * size)
        for half, number in enumerate((rank, 2 * size - 1 - rank)):
            first = start // size + half * chunk
            keys = range(start, start + (number + 1) * chunk)
            spans.append(Span(range(first, first + chunk), keys))
    return [span for span in spans if span.queries]


def packed_causal_attention(
    query_L: Tensor, key_T: Tensor, value_T: Tensor, spans: Sequence[Span], scale: float
) -> Tensor:
    """Return causal attention within each span, [L, heads, d].

    Neighbouring spans of one length are one batch, a view of their rows. Neighbouring short spans
    are padded to one batch: right padding cannot reach earlier tokens through a causal mask, and
    the padded rows are dropped. Every other span is a view of its rows.

    Args:
        query_L: [L, heads, d] float.
        key_T: [T, groups, d] float; groups divides heads.
        value_T: as `key_T`, or with heads of another size, which those returned then have.
        spans: cover the queries, in order; the last query of a span sits at its last key.
        scale: factor on the scores.
    """
    rows = span_rows(spans)
    key_T, value_T = _in_span_order(key_T, rows), _in_span_order(value_T, rows)
    grouped = query_L.shape[1] != key_T.shape[1]
    batches = _batches(spans)
    query_counts = [[len(span.queries) for span in batch] for batch in batches]
    key_counts = [[len(span.keys) for span in batch] for batch in batches]
    outputs = []
    for num_queries, num_keys, query, key, value in zip(
        query_counts,
        key_counts,
        _parts(query_L, query_counts),
        _parts(key_T, key_counts),
        _parts(value_T, key_counts),
        strict=True,
    ):
        mask = None if num_queries == num_keys else _causal_mask(num_queries, num_keys, key.device)
        padded = F.scaled_dot_product_attention(
            _padded(query, num_queries),
            _padded(key, num_keys),
            _padded(value, num_keys),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=grouped,
        )
        outputs.append(_unpadded(padded, num_queries))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _parts(x_N: Tensor, counts: list[list[int]]) -> Sequence[Tensor]:
    """Return the rows of each batch. Split, and not slices: the backward pass of each slice would
    fill a whole row of zeros. That of a split copies, so one batch is left as it is."""
    return [x_N] if len(counts) == 1 else x_N.split([sum(batch) for batch in counts])


SHORT = 32
"""Keys of a span up to which calls cost more than padding."""


def _batches(spans: Sequence[Span]) -> list[list[Span]]:
    """Cut the spans, in order, into runs of equal lengths and runs of short ones, whose padding at
    most doubles their keys."""
    batches: list[list[Span]] = []
    real = longest = 0
    is_even = True
    for span in spans:
        length = len(span.keys)
        longest, real = max(longest, length), real + length
        batch = batches[-1] if batches else []
        is_even = is_even and batch != [] and _lengths(span) == _lengths(batch[0])
        is_short = batch != [] and longest <= SHORT and longest * (len(batch) + 1) <= 2 * real
        if is_even or is_short:
            batch.append(span)
        else:
            batches.append([span])
            longest = real = length
            is_even = True
    return batches


def _lengths(span: Span) -> tuple[int, int]:
    return len(span.queries), len(span.keys)


def _padded(x_N: Tensor, lengths: list[int]) -> Tensor:
    """Return [n, heads, longest, d] of parts of N rows; rows past the end of a part repeat its
    last one."""
    if len(set(lengths)) == 1:
        return x_N.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2)
    lengths_n = torch.tensor(lengths, device=x_N.device)
    firsts_n = lengths_n.cumsum(0) - lengths_n
    within = torch.arange(max(lengths), device=x_N.device)
    index = firsts_n.unsqueeze(1) + torch.minimum(within, lengths_n.unsqueeze(1) - 1)
    return x_N[index].transpose(1, 2)


def _unpadded(padded: Tensor, lengths: list[int]) -> Tensor:
    """Return [N, heads, d], the real rows of [n, heads, longest, d]."""
    rows = padded.transpose(1, 2)
    if len(set(lengths)) == 1:
        return rows.flatten(0, 1)
    within = torch.arange(rows.shape[1], device=rows.device)
    return rows[within < torch.tensor(lengths, device=rows.device).unsqueeze(1)]


def _causal_mask(num_queries: list[int], num_keys: list[int], device: torch.device) -> Tensor:
    """Return [n, 1, queries, keys] bool: the last query sees the last key, earlier ones less."""
    ahead_n = torch.tensor(num_keys, device=device) - torch.tensor(num_queries, device=device)
    query = torch.arange(max(num_queries), device=device).unsqueeze(1)
    key = torch.arange(max(num_keys), device=device)
    return (key <= query + ahead_n.view(-1, 1, 1)).unsqueeze(1)


def packed_flash_attention(
    query_L: Tensor, key_T: Tensor, value_T: Tensor, spans: Sequence[Span], scale: float
) -> Tensor:
    """Return what `packed_causal_attention` does, by torch's flash attention kernel.

    The kernel aligns the last query of a sequence with its last key, which is what a span says.
    Tensors are bfloat16 or float16 on CUDA, with heads of a size that 8 divides. Smaller heads of
    values are padded with zeros to the size of those of keys, which is the one size it has.
    """
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler

    value_size = value_T.shape[-1]
    value_T = F.pad(value_T, (0, key_T.shape[-1] - value_size))
    rows = span_rows(spans)
    key_T, value_T = _in_span_order(key_T, rows), _in_span_order(value_T, rows)
    queries, keys = (
        torch.tensor(bounds, dtype=torch.int32, device=query_L.device)
        for bounds in (rows.query_bounds, rows.key_bounds)
    )
    out = varlen_attn(
        query_L,
        key_T,
        value_T,
        queries,
        keys,
        max(len(span.queries) for span in spans),
        max(len(span.keys) for span in spans),
        scale=scale,
        window_size=(-1, 0),  # causal
        **GROUPED_FLASH_ARGUMENTS,
    )
    assert isinstance(out, Tensor)  # a pair only where it is asked for
    return out[..., :value_size]


class SpanRows(NamedTuple):
    """Spans as rows that follow each other, for queries and for keys."""

    query_bounds: list[int]
    """Cumulative lengths, from 0."""
    key_bounds: list[int]
    """Cumulative lengths, from 0."""
    key_positions: list[int] | None
    """Rows of keys to take; None for all, in order. Spans of one sequence share keys under context
    parallelism, and here each has its own."""


def span_rows(spans: Sequence[Span]) -> SpanRows:
    """Return the spans as rows that follow each other."""
    query_bounds = [0, *itertools.accumulate(len(span.queries) for span in spans)]
    key_bounds = [0, *itertools.accumulate(len(span.keys) for span in spans)]
    shared = any(span.queries != span.keys for span in spans)
    positions = [position for span in spans for position in span.keys] if shared else None
    return SpanRows(query_bounds, key_bounds, positions)


def _in_span_order(x_T: Tensor, rows: SpanRows) -> Tensor:
    """Return the keys (or values) of the spans, one span after the other."""
    if rows.key_positions is None:
        return x_T
    return x_T[torch.tensor(rows.key_positions, device=x_T.device)]
