"""The log of a run as its loop uses it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mcore_rl.cluster.cluster import Cluster
from mcore_rl.cluster.memory import peak_metrics
from mcore_rl.config.run import TrainerConfig
from mcore_rl.metrics import Metrics, mean, total
from mcore_rl.observability.trackers import RunLog


@contextlib.contextmanager
def open_log(
    trainer: TrainerConfig, run_dir: Path, start_step: int, total_steps: int
) -> Iterator[RunLog]:
    """Open the trackers that `trainer.logger` names, and close them whatever happens."""
    log = RunLog(
        run_dir,
        trainer.logger,
        total_steps,
        start_step,
        trainer.project_name,
        trainer.experiment_name,
    )
    with contextlib.closing(log):
        yield log


def performance(cluster: Cluster) -> Metrics:
    """Return how busy the engines and how full the train workers have been since the last call."""
    busy = {"perf/engines_busy_frac": mean(cluster.engines.busy_share())}
    return busy | peak_metrics(cluster.workers)


def with_times(metrics: Metrics, times: Metrics) -> Metrics:
    """Return the metrics of a step with its times and the tokens trained per second of it."""
    tokens = metrics.get("batch/tokens", total(0.0))  # none while the critic alone trains
    tokens_per_s = tokens.value / times["time/step"].value
    return {**metrics, **times, "perf/tokens_per_s": mean(tokens_per_s)}
