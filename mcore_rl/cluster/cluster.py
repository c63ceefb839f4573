"""What a loop is given: the trainer, the engines and the workers behind them."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.cluster.engines import Engines
from mcore_rl.cluster.group import WorkerGroup
from mcore_rl.cluster.placement import Placement
from mcore_rl.cluster.routes import Routes
from mcore_rl.cluster.trainer import Trainer
from mcore_rl.data.packing import Cut


@dataclass(frozen=True, slots=True)
class Cluster:
    """The running processes of a run, as its loop sees them."""

    workers: WorkerGroup
    trainer: Trainer
    engines: Engines
    routes: Routes

    @classmethod
    def of(
        cls,
        workers: WorkerGroup,
        placement: Placement,
        cut: Cut,
        critic_cut: Cut | None = None,
        max_engine_restarts: int = 0,
    ) -> Cluster:
        """Return the cluster of running workers; see `Trainer` for the cuts, `Engines` for the
        restarts."""
        routes = Routes(workers, placement)
        trainer = Trainer(workers, placement, routes, cut, critic_cut)
        engines = Engines(workers, placement, routes, max_engine_restarts)
        return cls(workers, trainer, engines, routes)

    def enter_step(self, step: int) -> None:
        """Have failures from here on name `step`; routes of earlier ones are dropped."""
        self.workers.step = step
        self.routes.drop()

    def close(self) -> None:
        """End all workers."""
        self.workers.close()
