"""The routes stored in a worker: those that its engine or its actor recorded, and those that other
workers sent.

If an engine returned no routes, or routes of another part of the sequence, training would use other
experts than sampling, and nothing else would show it. So routes are checked before they are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mcore_rl.errors import RolloutError
from mcore_rl.megatron.parallel import Parallel
from mcore_rl.types import RoutesAt, Routing, Share
from mcore_rl.workers.roles import RouteHolder


class RouteStore(RouteHolder):
    """Routes by the rank that recorded them and its key.

    Args:
        routing: experts of the model; None for one without.
        parallel: process groups.
    """

    def __init__(self, routing: Routing | None, parallel: Parallel) -> None:
        self._routing, self._rank, self._group = routing, parallel.rank, parallel.host
        self._held: dict[tuple[int, int], np.ndarray] = {}
        self._num_recorded = 0

    def keep(self, routes: np.ndarray) -> RoutesAt:
        """Keep the routes of one sequence, [tokens - 1, MoE layers, topk]; return where they are.

        They are held as uint8, or as uint16 with more than 256 experts.
        """
        at = RoutesAt(rank=self._rank, key=self._num_recorded)
        self._num_recorded += 1
        self._held[at.rank, at.key] = routes.astype(self._dtype, copy=False)
        return at

    def get(self, rank: int, key: int) -> np.ndarray:
        """Return routes stored here."""
        return self._held[rank, key]

    def filled(self, share: Share | None) -> Share | None:
        """Return the share with the routes themselves in place of their locations."""
        if share is None or share.whole.routes_at is None:
            return share
        routes = [self.get(rank, key) for rank, key in share.whole.routes_at.tolist()]
        whole = replace(share.whole, routed_experts=np.concatenate(routes), routes_at=None)
        return replace(share, whole=whole)

    def exchange(self, gives: Mapping[int, np.ndarray], takes: Mapping[int, np.ndarray]) -> None:
        """Send routes to other ranks and receive theirs, over the network of the workers."""
        sent = {
            rank: torch.from_numpy(
                np.concatenate([self.get(self._rank, key) for key in keys.tolist()]).view(np.uint8)
            )
            for rank, keys in gives.items()
        }
        received = {
            rank: np.empty(self._shape(int(of_rank[:, 1].sum())), self._dtype)
            for rank, of_rank in takes.items()
        }
        transfers = [dist.isend(rows, rank, group=self._group) for rank, rows in sent.items()]
        transfers += [
            dist.irecv(torch.from_numpy(rows.view(np.uint8)), rank, group=self._group)
            for rank, rows in received.items()
        ]
        for transfer in transfers:
            assert transfer is not None, "this rank is of the group"
            transfer.wait()
        for rank, of_rank in takes.items():
            parts = np.split(received[rank], of_rank[:, 1].cumsum()[:-1])
            for key, part in zip(of_rank[:, 0].tolist(), parts, strict=True):
                self._held[rank, key] = part

    def drop(self) -> None:
        """Drop all routes."""
        self._held = {}

    @property
    def _dtype(self) -> type[np.uint8] | type[np.uint16]:
        assert self._routing is not None, "the model has no experts"
        return np.uint8 if self._routing.num_experts <= 256 else np.uint16

    def _shape(self, num_inputs: int) -> tuple[int, int, int]:
        assert self._routing is not None, "the model has no experts"
        return num_inputs, len(self._routing.layers), self._routing.topk


def check_routes(
    routes: np.ndarray | RoutesAt | None, num_inputs: int, routing: Routing
) -> np.ndarray:
    """Return the routes that an engine returned for a sequence, of experts that exist.

    Args:
        routes: as the engine returned them.
        num_inputs: tokens of the sequence but the last.
        routing: experts of the model.

    Raises:
        RolloutError: saying what the engine returned.
    """
    expected = num_inputs, len(routing.layers), routing.topk
    if not isinstance(routes, np.ndarray) or routes.shape != expected or routes.dtype.kind != "u":
        found = "none"
        if isinstance(routes, np.ndarray):
            found = f"{routes.dtype} of shape {routes.shape}"
        raise RolloutError(
            f"the engine returned routed experts {found} for {num_inputs + 1} tokens, not unsigned "
            f"integers of shape {expected} (tokens - 1, layers with experts, experts per token); "
            "actor.router_replay.mode=R3 needs them",
            role="rollout",
        )
    _refuse_where(np.any(routes >= routing.num_experts, axis=-1), routes, routing)
    return routes


def check_experts_differ(routes: np.ndarray, routing: Routing) -> None:
    """Check that the experts of a token differ; 8 us a token with 48 layers and 8 experts.

    Raises:
        RolloutError: saying what the engine returned.
    """
    experts = np.sort(routes, axis=-1)
    _refuse_where(np.any(experts[..., 1:] == experts[..., :-1], axis=-1), routes, routing)


def _refuse_where(is_wrong: Any, experts: np.ndarray, routing: Routing) -> None:
    if is_wrong.any():
        token, layer = np.argwhere(is_wrong)[0].tolist()
        raise RolloutError(
            f"the engine returned the experts {experts[token, layer].tolist()} for token {token} "
            f"in layer {routing.layers[layer]}, not {routing.topk} different ones below "
            f"{routing.num_experts}",
            role="rollout",
        )
