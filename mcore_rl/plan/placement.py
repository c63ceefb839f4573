"""Where every rank stands in the parallel layout, without starting one.

The order is Megatron-Core's default, "tp-cp-ep-dp-pp" from the fastest axis to the slowest
(parallel_state.py, RankGenerator). Dense and expert parameters divide the same ranks of a pipeline
stage in two ways: tp x cp x dp, and etp x ep x expert dp.

Example: tp 2, ep 2, etp 1 on four ranks: tp 0 1 0 1, dp 0 0 1 1; ep 0 1 0 1, expert dp 0 0 1 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.types import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """One rank's place on every axis."""

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    expert_dp: int


def coordinates(layout: Layout) -> list[Coordinates]:
    """Return the place of every rank, in order."""
    return [_place(rank, layout) for rank in range(layout.world_size)]


def expert_dp_size(layout: Layout) -> int:
    """Return how many ranks hold the same shard of an expert."""
    return layout.world_size // (layout.etp * layout.ep * layout.pp)


def _place(rank: int, layout: Layout) -> Coordinates:
    pp, in_stage = divmod(rank, layout.tp * layout.cp * layout.dp)
    dense, tp = divmod(in_stage, layout.tp)
    dp, cp = divmod(dense, layout.cp)
    of_experts, etp = divmod(in_stage, layout.etp)
    expert_dp, ep = divmod(of_experts, layout.ep)
    return Coordinates(rank=rank, tp=tp, cp=cp, dp=dp, pp=pp, ep=ep, etp=etp, expert_dp=expert_dp)
