"""One worker process: a rank of the actor and, for reinforcement learning, an engine beside it;
where the advantages need values, a rank of the critic too.

The launcher makes one per process and passes the calls of the controller to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mcore_rl.megatron import cpu, parallel
from mcore_rl.rollout.base import EngineSpec
from mcore_rl.rollout.hosts.in_process import InProcessEngine
from mcore_rl.weight_sync.base import Link
from mcore_rl.workers.actor_worker import ActorWorker
from mcore_rl.workers.critic_worker import CriticWorker
from mcore_rl.workers.memory import MemoryGauge, meter_of
from mcore_rl.workers.roles import (
    Actor,
    Critic,
    Memory,
    Rollout,
    RouteHolder,
    WeightSource,
    handlers,
)
from mcore_rl.workers.rollout_worker import RolloutWorker
from mcore_rl.workers.spec import WorkerSpec
from mcore_rl.workers.weight_source import WeightSourceWorker


class Worker:
    """Build after the default process group exists (vLLM would make one of its own).

    Args:
        spec: the same on every rank.
        device: of this rank.
    """

    def __init__(self, spec: WorkerSpec, device: torch.device) -> None:
        cpu.install()
        self.memory = MemoryGauge(meter_of(device))
        spec = spec.on_this_machine()
        self.parallel = parallel.initialize(spec.placement.layout, spec.actor.megatron.seed)
        self.placement = spec.placement
        self.place = spec.placement.places[self.parallel.rank]
        assert self.parallel.coordinates == self.place.coordinates, "Megatron numbers otherwise"
        # Parts that can be offloaded are offloaded at once: the next one may need the memory.
        self.actor = ActorWorker(spec.actor, self.parallel, device)
        self.actor.offload(spec.offloads.actor)
        self.critic = None
        if spec.critic:
            self.critic = CriticWorker(spec.critic, self.parallel, device)
            self.critic.offload(spec.offloads.critic)
        self.rollout = self.weights = None
        if spec.engine:
            links = self._links(spec.engine)
            engine = None
            if self.place.engine is not None:
                engine = InProcessEngine(spec.engine, links[self.place.engine])
                is_first = self.place.engine_rank == 0
                self.rollout = RolloutWorker(spec.engine, engine, is_first, self.actor.routes)
            bucket_bytes = spec.engine.config.update_weights_bucket_mib << 20
            senders = None  # all ranks: each contains a part of an engine
            if all(place.engine is None for place in self.placement.places):
                senders = {place.fed_by for place in self.placement.engines} or {0}
            tells = self.place.rank == min(senders or {0})
            exporter, adapters = self.actor.exporter, None
            if spec.engine.adapters:
                exporter, adapters = self.actor.separate_exporters()
            self.weights = WeightSourceWorker(
                exporter, links, engine, bucket_bytes, senders, adapters, tells
            )

    def _links(self, spec: EngineSpec) -> Mapping[int, Link]:
        """Return the links to the engines that this rank feeds, by number."""
        feeds = {e.engine: 0 for e in self.placement.engines if e.fed_by == self.place.rank}
        num_receivers = spec.config.tensor_model_parallel_size
        if self.place.engine is not None:  # each of its ranks has a part
            feeds, num_receivers = {self.place.engine: self.place.engine_rank}, 1
        return {
            engine: Link(
                transport=spec.config.transport,
                run_folder=spec.run_folder,
                engine=engine,
                engine_rank=engine_rank,
                num_receivers=num_receivers,
            )
            for engine, engine_rank in feeds.items()
        }

    @property
    def roles(self) -> Mapping[type, Any]:
        """The object for each role in this process."""
        found = {
            Actor: self.actor,
            Critic: self.critic,
            Rollout: self.rollout,
            RouteHolder: self.actor.routes,
            WeightSource: self.weights,
            Memory: self.memory,
        }
        return {role: holder for role, holder in found.items() if holder is not None}

    @property
    def handlers(self) -> Mapping[Callable[..., Any], Callable[..., Any]]:
        """The function that does it here, by method of a role, such as `Actor.update`."""
        return self.memory.watched(handlers(self.roles))

    def close(self) -> None:
        """Free engine, senders and process groups."""
        if self.rollout is not None:
            self.rollout.close()
        if self.weights is not None:
            self.weights.close()
        parallel.shut_down()
