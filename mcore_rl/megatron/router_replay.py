"""Which experts the routers of a model choose: their own, recorded, or replayed.

A token near the border between two experts may go to one in the engine and to the other in the
trainer, or to one before an update and to the other after it, and then its log-probability jumps.
Replay fixes the choice: the router still computes its scores, and the gradient still reaches it
through the scores of the experts that are replayed, but which they are is given.

Routes travel with the sequences (`TokenSequence.routed_experts`), so a pass replays exactly where
its sequences carry them. A model whose passes are not told of any routes, such as the reference,
is never touched.

Megatron's own `RouterReplay` does the replay of one router. What is here sets one per router of
this model, for each forward of a micro-batch through a chunk, with the positions and layers that
this rank holds: its context-parallel cut of the row, its sequence-parallel part of that, the layers
of its stage. A backward that computes a layer again takes the routes of its micro-batch from a
queue, which is right because every chunk runs backward in the order in which it ran forward.

Shapes: T positions of the whole row, R of them at this rank's routers, L layers with experts in the
whole model, K experts per token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from mcore_rl.data.batch import PackedBatch
from mcore_rl.megatron.context_parallel import local_positions
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.metrics import Metric, Metrics
from mcore_rl.types import MicroBatch, Routing

Routes = Callable[[Any, PackedBatch], AbstractContextManager[None]]
"""(chunk, this rank's part of a micro-batch) -> context in which the chunk's forward runs."""


def own_routes(chunk: Any, batch: PackedBatch) -> AbstractContextManager[None]:
    """Let the routers choose: the `Routes` of a pass without record and replay."""
    return contextlib.nullcontext()


class _LayerReplay(RouterReplay):
    """Megatron's replay of one router, which besides counts the choices that the router shares."""

    def __init__(self, recomputes: bool) -> None:
        super().__init__()
        # The list of all instances of the process would mix policy and reference.
        RouterReplay.global_router_replay_instances.remove(self)
        self._recomputes = recomputes
        self._is_real_R = torch.zeros(0, dtype=torch.bool)
        self.num_own: Tensor | int = 0
        self.num_replayed: Tensor | int = 0

    def replay(self, routes_RK: Tensor) -> None:
        """Choose `routes_RK` [R, K] in the coming forward; -1 in the rows of padding."""
        self._is_real_R = routes_RK[:, 0] >= 0
        any_experts_K = torch.arange(routes_RK.shape[1], device=routes_RK.device)
        self.target_topk_idx = torch.where(self._is_real_R[:, None], routes_RK, any_experts_K)
        if self._recomputes:
            self.replay_backward_list.append(self.target_topk_idx)
        self.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def forward_ended(self) -> None:
        """Have a backward that computes the layer again choose what its forward chose."""
        self.target_topk_idx = None
        self.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (scores, experts) of the choice, both [R, K]; see `RouterReplay`."""
        rest = num_groups, group_topk, default_compute_topk
        values, chosen_RK = super().get_replay_topk(scores, topk, *rest)
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            _, own_RK = default_compute_topk(scores.detach(), topk, num_groups, group_topk)
            is_own_RK = (chosen_RK[:, :, None] == own_RK[:, None, :]).any(-1)
            self.num_own += is_own_RK[self._is_real_R].sum()
            self.num_replayed += self._is_real_R.sum() * topk
        return values, chosen_RK


class ModelRouters:
    """The routers of one model on this rank.

    Args:
        chunks: model chunks, not wrapped.
        routing: experts of the whole model; None for one without.
        parallel: process groups.
    """

    def __init__(self, chunks: Sequence[Any], routing: Routing | None, parallel: Parallel) -> None:
        self.routing, self._parallel = routing, parallel
        config = chunks[0].config
        self._sequence_parallel = config.sequence_parallel
        self.layers_of: dict[Any, list[tuple[int, _LayerReplay]]] = {chunk: [] for chunk in chunks}
        """By chunk: (number among the layers with experts, replay of its router)."""
        for chunk, layers in self.layers_of.items():
            for router in chunk.modules():
                if routing is not None and isinstance(router, TopKRouter):
                    replay = _LayerReplay(recomputes=config.recompute_granularity is not None)
                    router.router_replay = replay
                    assert router.layer_number is not None
                    layers.append((list(routing.layers).index(router.layer_number - 1), replay))

    @contextlib.contextmanager
    def replaying(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Routes]:
        """Yield the routes of a pass over `micro_batches`: those that they carry, if they do."""
        carried = {
            micro_batch.routed_experts is not None
            for micro_batch in micro_batches
            if len(micro_batch.lengths)
        }
        assert len(carried) <= 1, "some sequences of a pass carry routes and some do not"
        for replay in self._replays():
            replay.num_own, replay.num_replayed = 0, 0
        try:
            yield self._replay if True in carried else own_routes
        finally:
            self._let_routers_choose()

    def replay_metrics(self) -> Metrics:
        """Return `moe/replay_hit_frac` of the last pass that could replay: the share of replayed
        choices that the routers would have made themselves.

        Collective over the ranks of a model; every one of them returns the same.
        """
        if self.routing is None:
            return {}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        for replay in self._replays():
            counts[0] += replay.num_own
            counts[1] += replay.num_replayed
        self.sum_over_parts(counts)
        return {"moe/replay_hit_frac": Metric(counts[0], "mean", counts[1])}

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recording]:
        """Yield the routes of a pass in which the routers choose and their choice is recorded."""
        try:
            yield Recording(self)
        finally:
            self._let_routers_choose()

    def part_of(self, values_T: Tensor) -> Tensor:
        """Return what this rank's routers see of the positions that this rank holds."""
        if not self._sequence_parallel:
            return values_T
        return values_T.chunk(self._parallel.tp.size())[self._parallel.tp.rank()]

    def positions(self, batch: PackedBatch) -> Tensor:
        """Return the positions of the whole row that this rank's routers see, [R] int64."""
        cp = self._parallel.cp
        boundaries = tuple(batch.cu_seqlens_padded.tolist())
        if cp.size() == 1:
            return self.part_of(torch.arange(boundaries[-1]))
        return self.part_of(local_positions(boundaries, cp.rank(), cp.size()))

    def sum_over_parts(self, values: Tensor) -> None:
        """Sum in place over the ranks whose routers see other positions or layers of a row."""
        groups = [self._parallel.cp, self._parallel.pp]
        if self._sequence_parallel:
            groups.append(self._parallel.tp)
        for group in groups:
            dist.all_reduce(values, group=group)

    @contextlib.contextmanager
    def _replay(self, chunk: Any, batch: PackedBatch) -> Iterator[None]:
        assert self.routing is not None
        shape = len(batch.input_ids_T), len(self.routing.layers), self.routing.topk
        routes_TLK = batch.routed_experts_TLK
        if routes_TLK is None:  # an empty micro-batch: padding alone
            routes_TLK = torch.full(shape, -1, device=batch.input_ids_T.device)
        assert routes_TLK.shape == shape, f"routes of shape {tuple(routes_TLK.shape)}, not {shape}"
        routes_RLK = self.part_of(routes_TLK).long()
        for index, replay in self.layers_of[chunk]:
            replay.replay(routes_RLK[:, index])
        yield
        for _, replay in self.layers_of[chunk]:
            replay.forward_ended()

    def _replays(self) -> Iterator[_LayerReplay]:
        for layers in self.layers_of.values():
            for _, replay in layers:
                yield replay

    def _let_routers_choose(self) -> None:
        for replay in self._replays():
            replay.clear_indices()
            replay.clear_router_replay_action()


class Recording:
    """The routes of one pass, recorded: a `Routes` to run it with, then what was chosen."""

    def __init__(self, routers: ModelRouters) -> None:
        self._routers = routers
        self._of_chunk: dict[Any, list[tuple[PackedBatch, list[Tensor]]]] = {
            chunk: [] for chunk in routers.layers_of
        }

    @contextlib.contextmanager
    def __call__(self, chunk: Any, batch: PackedBatch) -> Iterator[None]:
        replays = [replay for _, replay in self._routers.layers_of[chunk]]
        for replay in replays:
            replay.set_router_replay_action(RouterReplayAction.RECORD)
        yield
        chosen: Any = [replay.get_recorded_indices() for replay in replays]
        self._of_chunk[chunk].append((batch, chosen))

    def routes(self) -> np.ndarray:
        """Return the routes of all sequences end to end, in the order of the pass.

        Collective over the ranks of a model; every one of them returns all.

        Returns:
            [sum of tokens - 1, L, K] uint8, or uint16 with more than 256 experts.
        """
        # One item per micro-batch, with what the chunks of this rank recorded of it.
        micro_batches = zip(*self._of_chunk.values(), strict=True)
        return np.concatenate([self._whole(recorded) for recorded in micro_batches])

    def _whole(self, recorded: Sequence[tuple[PackedBatch, list[Tensor]]]) -> np.ndarray:
        """Return the routes of the sequences of one micro-batch."""
        batch, routing = recorded[0][0], self._routers.routing
        assert routing is not None, "there are no routers to record"
        num_positions = int(batch.cu_seqlens_padded[-1])
        shape = num_positions, len(routing.layers), routing.topk
        # Every rank fills in its positions and layers; the rest is 0 and the sum is the whole.
        whole_TLK = torch.zeros(shape, dtype=torch.int32, device=batch.input_ids_T.device)
        positions_R = self._routers.positions(batch).to(whole_TLK.device)
        for layers, (_, chosen) in zip(self._routers.layers_of.values(), recorded, strict=True):
            for (index, _), chosen_RK in zip(layers, chosen, strict=True):
                whole_TLK[positions_R, index] = chosen_RK.int()
        self._routers.sum_over_parts(whole_TLK)
        dtype = np.uint8 if routing.num_experts <= 256 else np.uint16
        return whole_TLK.cpu().numpy().astype(dtype)[batch.real_positions]
