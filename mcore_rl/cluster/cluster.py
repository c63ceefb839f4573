"""What a loop is given: the trainer, the engines and the workers behind them."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.cluster.engines import Engines
from mcore_rl.cluster.fleet import Fleet
from mcore_rl.cluster.group import WorkerGroup
from mcore_rl.cluster.phases import Phases
from mcore_rl.cluster.placement import Placement
from mcore_rl.cluster.routes import Routes
from mcore_rl.cluster.trainer import Trainer
from mcore_rl.data.packing import Cut
from mcore_rl.types import Offloads


@dataclass(frozen=True, slots=True)
class Cluster:
    """The running processes of a run, as its loop sees them."""

    workers: WorkerGroup
    trainer: Trainer
    engines: Fleet
    routes: Routes
    phases: Phases

    @classmethod
    def of(
        cls,
        workers: WorkerGroup,
        placement: Placement,
        cut: Cut,
        critic_cut: Cut | None = None,
        max_engine_restarts: int = 0,
        offloads: Offloads | None = None,
        sleep_level: int = 0,
    ) -> Cluster:
        """Return the cluster of running workers; see `Trainer` for the cuts, `Phases` for the
        sleep, `Engines` for the restarts.

        `offloads` are the parts that the workers offload; None: nothing.
        """
        routes = Routes(workers, placement)
        engine_ranks = [rank for ranks in placement.engine_ranks for rank in ranks]
        phases = Phases(workers, offloads or Offloads(), engine_ranks, sleep_level)
        trainer = Trainer(workers, placement, routes, phases, cut, critic_cut)
        engines = Engines(workers, placement, routes, phases, max_engine_restarts)
        return cls(workers, trainer, engines, routes, phases)

    def enter_step(self, step: int) -> None:
        """Make failures from here on name `step`; drop the routes of earlier steps."""
        self.workers.step = step
        self.routes.drop()

    def interrupt(self) -> None:
        """Make the engines abort their generation, now and from now on; a call that waits for it
        raises StoppedError. From any thread."""
        self.engines.interrupt()

    def close(self) -> None:
        """End all workers."""
        self.workers.close()
