"""The parallel layout: config, process groups as one object, and where this rank stands.

Nothing outside `megatron/` asks a module-level getter for a group: groups travel as `Parallel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from mcore_rl.types import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Process groups of the layout and this rank's place in each."""

    layout: Layout
    rank: int
    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    """Data and context parallel together: what gradients are summed over."""
    ep: ProcessGroup
    etp: ProcessGroup
    tp_ep: ProcessGroup
    """Expert tensor and expert parallel together, ranked etp fastest."""
    expert_dp: ProcessGroup
    share: ProcessGroup
    """The ranks that work on the same sequences (tp, cp and pp together), of gloo: for what lies on
    the host."""
    host: ProcessGroup | None
    """All ranks, of gloo, for what lies on the host; None: the default group."""

    @property
    def coordinates(self) -> tuple[int, ...]:
        """On the axes tp, cp, dp, pp, ep, etp and expert dp, as `cluster.placement` plans them."""
        groups = self.tp, self.cp, self.dp, self.pp, self.ep, self.etp, self.expert_dp
        return tuple(group.rank() for group in groups)

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def reports_tokens(self) -> bool:
        """Whether this rank answers for its positions of its micro-batches: last stage, first of
        its tensor-parallel group."""
        return self.is_last_stage and self.tp.rank() == 0

    @property
    def reports_sequences(self) -> bool:
        """Whether this rank answers for whole sequences: besides, first of its context-parallel
        group."""
        return self.reports_tokens and self.cp.rank() == 0


def initialize(layout: Layout, seed: int) -> Parallel:
    """Create Megatron's process groups for `layout` and seed its random states.

    Args:
        layout: must multiply to the world size of the default process group.
        seed: base seed; Megatron derives those of the parallel ranks from it.
    """
    assert layout.world_size == dist.get_world_size(), (layout, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,  # a mesh of sockets for each; nothing of ours uses them
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    groups: Any = parallel_state  # its annotations also allow lists and absent groups
    host: Any = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return Parallel(
        layout=layout,
        rank=dist.get_rank(),
        tp=groups.get_tensor_model_parallel_group(),
        pp=groups.get_pipeline_model_parallel_group(),
        cp=groups.get_context_parallel_group(),
        dp=groups.get_data_parallel_group(),
        dp_cp=groups.get_data_parallel_group(with_context_parallel=True),
        ep=groups.get_expert_model_parallel_group(),
        etp=groups.get_expert_tensor_parallel_group(),
        tp_ep=groups.get_expert_tensor_and_model_parallel_group(),
        expert_dp=groups.get_expert_data_parallel_group(),
        share=_share_group(layout.dp, groups.get_data_parallel_rank(), host),
        host=host,
    )


def _share_group(num_shares: int, dp_rank: int, host: ProcessGroup | None) -> ProcessGroup:
    """Return the group of this rank and all others with its place in data parallelism."""
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, dp_rank, group=host)
    own: Any = None
    for share in range(num_shares):  # every rank takes part in making every group
        ranks = [rank for rank, of_rank in enumerate(by_rank) if of_rank == share]
        group = dist.new_group(ranks, backend="gloo")
        own = group if share == dp_rank else own
    return own


def shut_down() -> None:
    """Destroy Megatron's process groups; the default one stays."""
    parallel_state.destroy_model_parallel()
