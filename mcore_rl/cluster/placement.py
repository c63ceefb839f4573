"""Where each process runs: nodes, devices, parallel axes, engines. Computed from the configuration.

The order of the ranks is Megatron-Core's default, "tp-cp-ep-dp-pp" from the fastest axis to the
slowest (parallel_state.py, RankGenerator). Dense and expert parameters divide the same ranks of a
pipeline stage in two ways: tp x cp x dp, and etp x ep x expert dp.

Engines are parts of the train workers (adjacent ranks form one engine), or processes of their own,
which run on the devices of the train workers, in turn with them, or on other devices. The
controller reaches these processes by the ranks that follow the train workers' ranks.

Example: tp 2, ep 2, etp 1 on four ranks: tp 0 1 0 1, dp 0 0 1 1; ep 0 1 0 1, expert dp 0 0 1 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mcore_rl.types import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one worker stands: its node and device, and its coordinate on every axis."""

    rank: int
    node: int
    device: int
    """Number of the device on the node."""
    tp: int
    cp: int
    dp: int
    pp: int
    ep: int
    etp: int
    expert_dp: int
    engine: int | None = None
    """Number of the engine that it hosts, or hosts a part of; None: it cannot generate."""
    engine_rank: int = 0
    """Its rank in that engine; the first answers for all."""

    @property
    def coordinates(self) -> tuple[int, ...]:
        """On the axes tp, cp, dp, pp, ep, etp and expert dp."""
        return self.tp, self.cp, self.dp, self.pp, self.ep, self.etp, self.expert_dp


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlace:
    """Where an engine runs that is a process of its own."""

    engine: int
    """Its number."""
    rank: int
    """The rank under which the controller reaches it."""
    node: int
    devices: tuple[int, ...]
    """Devices on the node, one for each of the engine's ranks. Empty for a server, because the
    process here only sends requests to it."""
    fed_by: int
    """Rank of the train worker that sends it weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """All workers of a run, by rank."""

    layout: Layout
    places: Sequence[Place]
    engines: Sequence[EnginePlace] = ()
    """Engines that are processes of their own."""

    @property
    def world_size(self) -> int:
        return len(self.places)

    @property
    def num_nodes(self) -> int:
        return 1 + max(place.node for place in self.places)

    @property
    def share_ranks(self) -> list[list[int]]:
        """By data-parallel rank: the ranks that work on its share. The first rank receives the
        share and sends it to the others."""
        ranks: list[list[int]] = [[] for _ in range(self.layout.dp)]
        for place in self.places:
            ranks[place.dp].append(place.rank)
        return ranks

    @property
    def engine_ranks(self) -> list[list[int]]:
        """By engine: its ranks, the first of which answers."""
        if self.engines:
            return [[place.rank] for place in self.engines]
        found: dict[int, list[int]] = {}
        for place in self.places:
            if place.engine is not None:
                found.setdefault(place.engine, []).append(place.rank)
        return [found[engine] for engine in sorted(found)]


def colocated(layout: Layout, devices_per_node: int, engine_size: int | None) -> Placement:
    """Return the placement of one train worker per device, with the engines among them.

    Args:
        layout: of actor and critic.
        devices_per_node: train workers of a node.
        engine_size: devices of one engine; None: nothing is generated.
    """
    return Placement(
        layout=layout,
        places=[
            _place(rank, layout, devices_per_node, engine_size) for rank in range(layout.world_size)
        ],
    )


def engines_apart(
    layout: Layout,
    devices_per_node: int,
    engine_size: int,
    own_nodes: int = 0,
    own_devices_per_node: int = 0,
) -> Placement:
    """Return the placement with engines that are processes of their own.

    Args:
        layout: of actor and critic.
        devices_per_node: train workers of a node.
        engine_size: devices of one engine.
        own_nodes: number of nodes without train workers; 0: engines share the train workers'
            devices.
        own_devices_per_node: devices of each of these nodes.
    """
    trainer = colocated(layout, devices_per_node, None)
    num_nodes, per_node = trainer.num_nodes, devices_per_node
    if own_nodes:
        num_nodes, per_node = own_nodes, own_devices_per_node
    engines = []
    for engine in range(num_nodes * per_node // engine_size):
        node, first = divmod(engine * engine_size, per_node)
        engines.append(
            EnginePlace(
                engine=engine,
                rank=layout.world_size + engine,
                node=node + (trainer.num_nodes if own_nodes else 0),
                devices=tuple(range(first, first + engine_size)),
                fed_by=engine % layout.world_size if own_nodes else engine * engine_size,
            )
        )
    return replace(trainer, engines=engines)


def servers_apart(layout: Layout, devices_per_node: int, num_servers: int) -> Placement:
    """Return the placement with servers as engines. The processes that send them requests, and the
    train workers that send them weights, are on the first node.

    Args:
        layout: of actor and critic.
        devices_per_node: train workers of a node.
        num_servers: each an engine.
    """
    trainer = colocated(layout, devices_per_node, None)
    on_first_node = min(devices_per_node, layout.world_size)
    engines = [
        EnginePlace(
            engine=engine,
            rank=layout.world_size + engine,
            node=0,
            devices=(),
            fed_by=engine % on_first_node,
        )
        for engine in range(num_servers)
    ]
    return replace(trainer, engines=engines)


def _place(rank: int, layout: Layout, devices_per_node: int, engine_size: int | None) -> Place:
    node, device = divmod(rank, devices_per_node)
    pp, in_stage = divmod(rank, layout.tp * layout.cp * layout.dp)
    dense, tp = divmod(in_stage, layout.tp)
    dp, cp = divmod(dense, layout.cp)
    of_experts, etp = divmod(in_stage, layout.etp)
    expert_dp, ep = divmod(of_experts, layout.ep)
    engine, engine_rank = divmod(rank, engine_size) if engine_size else (None, 0)
    return Place(
        rank=rank,
        node=node,
        device=device,
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        ep=ep,
        etp=etp,
        expert_dp=expert_dp,
        engine=engine,
        engine_rank=engine_rank,
    )


def expert_dp_size(layout: Layout) -> int:
    """Return how many ranks hold the same shard of an expert."""
    return layout.world_size // (layout.etp * layout.ep * layout.pp)
