"""What a loop is given: the trainer, the engines and the workers behind them."""

from __future__ import annotations

from dataclasses import dataclass

from mcore_rl.cluster.engines import Engines
from mcore_rl.cluster.group import WorkerGroup
from mcore_rl.cluster.placement import Placement
from mcore_rl.cluster.trainer import Trainer
from mcore_rl.data.packing import Cut


@dataclass(frozen=True, slots=True)
class Cluster:
    """The running processes of a run, as its loop sees them."""

    workers: WorkerGroup
    trainer: Trainer
    engines: Engines

    @classmethod
    def of(
        cls,
        workers: WorkerGroup,
        placement: Placement,
        cut: Cut,
        critic_cut: Cut | None = None,
    ) -> Cluster:
        """Return the cluster of running workers; see `Trainer` for the cuts."""
        trainer = Trainer(workers, placement, cut, critic_cut)
        return cls(workers, trainer, Engines(workers, placement))

    def enter_step(self, step: int) -> None:
        """Have failures from here on name `step`."""
        self.workers.step = step

    def close(self) -> None:
        """End all workers."""
        self.workers.close()
