"""One worker process: a rank of the actor and, for reinforcement learning, an engine beside it;
where the advantages need values, a rank of the critic too.

The launcher makes one per process and hands it the calls of the controller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mcore_rl.megatron import cpu, parallel
from mcore_rl.workers.actor_worker import ActorWorker
from mcore_rl.workers.critic_worker import CriticWorker
from mcore_rl.workers.roles import Actor, Critic, Rollout, RouteHolder
from mcore_rl.workers.rollout_worker import RolloutWorker
from mcore_rl.workers.spec import WorkerSpec


class Worker:
    """Build after the default process group exists (vLLM would make one of its own).

    Args:
        spec: the same on every rank.
        device: of this rank.
    """

    def __init__(self, spec: WorkerSpec, device: torch.device) -> None:
        cpu.install()
        spec = spec.on_this_machine()
        self.parallel = parallel.initialize(spec.placement.layout, spec.actor.megatron.seed)
        self.place = spec.placement.places[self.parallel.rank]
        assert self.parallel.coordinates == self.place.coordinates, "Megatron numbers otherwise"
        self.actor = ActorWorker(spec.actor, self.parallel, device)
        self.critic = CriticWorker(spec.critic, self.parallel, device) if spec.critic else None
        self.rollout = None
        if spec.engine:
            self.rollout = RolloutWorker(
                spec.engine, self.place, self.actor.exporter, self.actor.routes
            )

    @property
    def roles(self) -> Mapping[type, Any]:
        """Who answers to which role in this process."""
        found = {
            Actor: self.actor,
            Critic: self.critic,
            Rollout: self.rollout,
            RouteHolder: self.actor.routes,
        }
        return {role: holder for role, holder in found.items() if holder is not None}

    @property
    def handlers(self) -> Mapping[Callable[..., Any], Callable[..., Any]]:
        """By method of a role, `Actor.update`: what does it here."""
        return {
            method: getattr(holder, name)
            for role, holder in self.roles.items()
            for name, method in vars(role).items()
            if callable(method) and not name.startswith("_")
        }

    def close(self) -> None:
        """Free engine and process groups."""
        if self.rollout is not None:
            self.rollout.close()
        parallel.shut_down()
