"""One worker process: a rank of the actor and, for reinforcement learning, an engine beside it;
where the advantages need values, a rank of the critic too.

The launcher makes one per process and calls its methods by name, on all processes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mcore_rl.megatron import cpu, parallel
from mcore_rl.metrics import Metrics, to_host
from mcore_rl.rollout.base import GenerationRequest, GenerationResult
from mcore_rl.types import Place
from mcore_rl.workers.actor_worker import ActorWorker
from mcore_rl.workers.critic_worker import CriticWorker
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
        self.parallel = parallel.initialize(spec.layout, spec.actor.megatron.seed)
        self.actor = ActorWorker(spec.actor, self.parallel, device)
        self.critic = CriticWorker(spec.critic, self.parallel, device) if spec.critic else None
        self.rollout = RolloutWorker(spec.engine, self.parallel.rank) if spec.engine else None

    def place(self) -> Place:
        """Return where this rank stands, for the controller's placement of work."""
        return Place(
            dp_rank=self.parallel.dp.rank(),
            reports_tokens=self.parallel.reports_tokens,
            engine=self.rollout.number if self.rollout else None,
        )

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Generate on this process's engine, together with its other ranks; the first of them
        returns the results, the others none."""
        assert self.rollout is not None, "this process hosts no engine"
        return self.rollout.generate(requests)

    def sync_weights(self, version: int) -> Metrics:
        """Give this process's engine the actor's weights; collective."""
        assert self.rollout is not None, "this process hosts no engine"
        return to_host(self.rollout.receive(self.actor.exporter, version))

    def call(self, method: str, args: Sequence[Any]) -> Any:
        """Call a method by its dotted name ("actor.update") and return its result."""
        target: Any = self
        for name in method.split("."):
            target = getattr(target, name)
        return target(*args)

    def close(self) -> None:
        """Free engine and process groups."""
        if self.rollout is not None:
            self.rollout.engine.close()
        parallel.shut_down()
